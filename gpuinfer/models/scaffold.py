# SPDX-License-Identifier: Apache-2.0
"""Writes a first ``model.toml``, from the artefact, the options, and answers of the user."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuinfer.errors import UsageError
from gpuinfer.models.manifest import FORMATS
from gpuinfer.models.repository import name_of
from gpuinfer.models.specs import DTYPES
from gpuinfer.names import MODEL_NAME

#: Asks the user; takes the question and the default answer. None if there is nobody to ask.
Ask = Callable[[str, str], str]
_KINDS = ("json", "text", "bytes", "image", "audio", "file")
_INPUT_HELP = "--input NAME:DTYPE:SHAPE, such as --input {}:float32:3,224,224 (without the batch; -1 is free)"


@dataclass(kw_only=True)
class Wanted:
    """The values of options."""

    name: str | None = None
    class_name: str | None = None
    #: Each ``NAME:DTYPE:SHAPE`` or ``NAME:KIND``.
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    batchable: bool | None = None
    max_batch_size: int | None = None
    extra: list[str] = field(default_factory=list)


def artefact_in(folder: Path) -> Path:
    """Find the one file in a folder that can be a model's artefact. Raises UsageError."""
    found = sorted(path for path in folder.iterdir() if path.suffix in FORMATS and path.is_file())
    by_name = [path for path in found if path.stem == "model"]
    if len(found) == 1 or len(by_name) == 1:
        return (by_name or found)[0]
    if not found:
        raise UsageError(f"contains no model: no file with a suffix of {', '.join(FORMATS)}", str(folder))
    names = ", ".join(path.name for path in found)
    raise UsageError(
        f"contains {names}: rename the model's file to model{found[0].suffix}, or give its path", str(folder)
    )


def checked_artefact(path: Path) -> Path:
    """Return a file that can be an artefact. Raises UsageError."""
    if path.suffix not in FORMATS:
        raise UsageError(f"is not a model: its suffix must be one of {', '.join(FORMATS)}", str(path))
    return path


def manifest_text(artefact: Path, found: Mapping[str, Any], wanted: Wanted, ask: Ask | None = None) -> str:
    """Return a ``model.toml`` for an artefact that ``found`` describes (``described.Description``).

    Raises UsageError naming the option for what is known from nowhere and cannot be asked.
    """
    name = wanted.name or name_of(artefact)
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(f"a model cannot be called {name!r}; use a-z 0-9 _ . -", "--name")
    lines = [
        "# Written by gpuinfer model init; man gpuinfer-model explains every key.",
        f"name = {json.dumps(name)}",
        f"artefact = {json.dumps(artefact.name)}",
    ]
    if found["format"] == "python":
        lines += _python_lines(found, wanted, ask)
    else:
        lines += _tensor_lines(found, wanted, ask)
    return "\n".join(lines) + "\n"


def _python_lines(found: Mapping[str, Any], wanted: Wanted, ask: Ask | None) -> list[str]:
    lines = []
    classes = found["classes"]
    chosen = wanted.class_name
    if chosen is None and len(classes) > 1:
        if ask is None:
            raise UsageError(f"contains the classes {', '.join(classes)}: choose one with --class", "class")
        chosen = ask(f"Class of the model ({', '.join(classes)})", classes[0])
    if chosen is not None:
        lines.append(f"class = {json.dumps(chosen)}")
    lines += _sizes(found, wanted)
    if not wanted.inputs:
        lines += _annotated(found)
    if not found.get("example"):
        lines.append("# Give the class an attribute `example`: warm-up, checks and documentation use it.")
    lines += [line for text in wanted.inputs for line in _table("inputs", _parsed(text, tensors_only=False))]
    return lines + [line for text in wanted.outputs for line in _table("outputs", {"name": text})]


def _annotated(found: Mapping[str, Any]) -> list[str]:
    """Return a comment about the inputs, from the annotations."""
    signature = found.get("signature")
    if not signature or signature["source"] != "annotations":
        return [
            "# Its inputs: any JSON. To say more, annotate predict (def predict(self, batch: list[str])), "
            "or add [[inputs]]."
        ]
    kinds = ", ".join(f"{one['name']}: {one['kind']}" for one in signature["inputs"])
    return [f"# Its inputs, from the annotations: {kinds}."]


def _sizes(found: Mapping[str, Any], wanted: Wanted) -> list[str]:
    lines = []
    batchable = wanted.batchable if wanted.batchable is not None else found["batchable"]
    if not batchable:
        lines.append("batchable = false            # called with one item at a time; shapes are whole")
    size = wanted.max_batch_size or found["max_batch_size"]
    if size and batchable:
        lines.append(f"max_batch_size = {size}")
    return lines


def _tensor_lines(found: Mapping[str, Any], wanted: Wanted, ask: Ask | None) -> list[str]:
    given = {table["name"]: table for table in map(_parsed, wanted.inputs)}
    names = [one["name"] for one in found["inputs"]]
    strangers = [name for name in given if name not in names]
    if strangers:
        raise UsageError(f"there is no input {strangers[0]!r}; the inputs are {', '.join(names)}", "--input")
    lines = _sizes(found, wanted)
    for one in found["inputs"]:
        lines += _table("inputs", given.get(one["name"]) or _input(one, ask), one["source"])
    outputs = found["outputs"]
    if wanted.outputs and len(wanted.outputs) != len(outputs):
        raise UsageError(
            f"the model has {len(outputs)} outputs, but {len(wanted.outputs)} names were given", "--output"
        )
    for place, one in enumerate(outputs):
        table = {"name": wanted.outputs[place] if wanted.outputs else _good_name(one["name"], place)}
        table |= {key: one[key] for key in ("dtype", "shape") if one[key] is not None}
        lines += _table("outputs", table)
        if len(one["shape"] or ()) == 1:
            lines.append(
                '# kind = "classification"    # names the best; labels = ["...", ...], activation = "softmax"'
            )
    return lines


def _input(one: Mapping[str, Any], ask: Ask | None) -> dict[str, Any]:
    name, dtype, shape = one["name"], one["dtype"], one["shape"]
    if (dtype is None or shape is None) and ask is None:
        raise UsageError(
            f"dtype and shape of input {name} cannot be read from the file; give {_INPUT_HELP.format(name)}",
            "--input",
        )
    if dtype is None and ask is not None:
        dtype = _dtype(ask(f"dtype of input {name} ({', '.join(DTYPES)})", "float32"))
    if shape is None and ask is not None:
        shape = _shape(
            ask(f"Shape of input {name}, without the batch, such as 3,224,224; -1: any length", "")
        )
    return {"name": name, "dtype": dtype, "shape": shape}


def _parsed(text: str, *, tensors_only: bool = True) -> dict[str, Any]:
    """Read ``NAME:DTYPE:SHAPE``, or ``NAME:KIND`` for a Python model. Raises UsageError."""
    name, *rest = text.split(":")
    if len(rest) == 1 and rest[0] in _KINDS and not tensors_only:
        return {"name": name, "kind": rest[0]}
    if len(rest) != 2:
        raise UsageError(f"{text!r} must be {_INPUT_HELP.format(name or 'x')}", "--input")
    return {"name": name, "dtype": _dtype(rest[0]), "shape": _shape(rest[1])}


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise UsageError(f"{text!r} is not a dtype; must be one of {', '.join(DTYPES)}", "--input")
    return text


def _shape(text: str) -> list[int]:
    parts = [part for part in re.split(r"[,x ]+", text.strip().strip("[]()")) if part]
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise UsageError(f"{text!r} is not a shape; must be such as 3,224,224, or empty", "--input") from None


def _good_name(name: str, place: int) -> str:
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", name) else f"output_{place}"


def _table(kind: str, values: Mapping[str, Any], source: str = "") -> list[str]:
    lines = ["", f"[[{kind}]]"]
    for key, value in values.items():
        said = f"{key} = {json.dumps(value)}"
        lines.append(f"{said:<28} # {source}" if key == "shape" and source else said)
    return lines
