# SPDX-License-Identifier: Apache-2.0
"""Explains why a torch file cannot be loaded, and what to do. Nothing in the file is run."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import PurePath
from typing import BinaryIO

_SCRIPT_IT = (
    "export the program where its class is defined, with torch.jit.save(torch.jit.script(model.eval()), "
    '"model.pt") or torch.export.save(torch.export.export(model.eval(), (x,)), "model.pt2"), or write a '
    "model.py that builds the model and loads this file"
)
#: The names that a pickled state dict may contain; any other is a class of the model.
_WEIGHTS = re.compile(
    r"collections OrderedDict|torch\._utils \S+|torch\S* \w*(Storage|Tensor|Size|device|dtype|Parameter)"
    r"|torch \w+|torch\.serialization \S+|numpy\S* \S+|_codecs encode"
)
#: Messages of torch about a missing operator; the group is its name.
_OPERATORS = (
    re.compile(r"Unknown builtin op: (\w+::\w+)"),
    re.compile(r"failed to resolve torch\.ops\.(\w+\.\w+)"),
    re.compile(r"(?:Could not find schema for|no such operator|Didn't find operator:?) (\w+::\w+)"),
)
_CLASS = re.compile(r"Unknown type name '__torch__\.torch\.classes\.(\w+)\.\w+'")
#: Namespace of operators -> the module that registers them, if its name differs.
_MODULES = {"image": "torchvision", "quantized_decomposed": "torch.ao.quantization.fx._decomposed"}


def explain(file: BinaryIO, artefact: str, said: str, *, script: bool) -> str | None:
    """Return the cause and what to do; None if neither the file nor torch's message shows it.

    ``said``: all messages of torch; ``script``: whether TorchScript was expected, not a torch.export file.
    """
    operator = _missing_operator(said)
    if operator:
        module = _MODULES.get(operator.partition("::")[0], operator.partition("::")[0])
        return (
            f"it needs the operator {operator}, which no imported library registers; set imports = "
            f"[{module!r}] in model.toml, if that is the library's name, and install it"
        )
    kind = _kind_of(file)
    wanted = "script" if script else "export"
    if kind in (wanted, None):
        return None
    return _words(kind, PurePath(artefact).name)


def _missing_operator(said: str) -> str | None:
    for pattern in _OPERATORS:
        found = pattern.search(said)
        if found:
            return found[1].replace(".", "::")
    found = _CLASS.search(said)
    return f"{found[1]}::(a class)" if found else None


def _words(kind: str, name: str) -> str:
    stem = PurePath(name).stem
    if kind == "script":
        return f"it is TorchScript, but .pt2 means torch.export: rename {name} to {stem}.pt"
    if kind == "export":
        return f"it is a torch.export file, but its suffix means TorchScript: rename {name} to {stem}.pt2"
    if kind == "compiled":
        return "it is a package that AOTInductor compiled for one machine; save the exported program itself"
    if kind == "weights":
        return f"it is a state dict: weights without a program, as torch.save writes them; {_SCRIPT_IT}"
    if kind == "none":
        return (
            "it is neither TorchScript nor a torch.export file (both are zip archives): it has another "
            "format, or its download is incomplete"
        )
    return f"it is a pickled object of {kind}, as torch.save writes it, and needs its code; {_SCRIPT_IT}"


def _kind_of(file: BinaryIO) -> str | None:
    """Return script, export, compiled, weights, none, or the class of a pickled object; None: damaged."""
    file.seek(0)
    head = file.read(2)
    file.seek(0)
    if head == b"\x80\x02":  # torch.save before 1.6 wrote a bare pickle
        return "weights"
    if not zipfile.is_zipfile(file):
        return "none"
    try:
        with zipfile.ZipFile(file) as archive:
            return _kind_of_archive(archive)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError):
        return None


def _kind_of_archive(archive: zipfile.ZipFile) -> str | None:
    # All but the oldest torch.export files have everything in one folder.
    names = {name.partition("/")[2] for name in archive.namelist()} | set(archive.namelist())
    if "serialized_exported_program.json" in names or any(re.match(r"models/.*\.json$", n) for n in names):
        return "export"
    if "archive_format" in names:
        return "compiled"
    if "constants.pkl" in names:
        return "script"
    pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    return _pickled(archive.read(pickled)) if pickled else "none"


def _pickled(data: bytes) -> str:
    """Distinguish a state dict from another object by the classes in the pickle, without unpickling it."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and not _WEIGHTS.fullmatch(str(argument)):
            return str(argument).replace(" ", ".")
    return "weights"
