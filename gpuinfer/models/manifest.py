# SPDX-License-Identifier: Apache-2.0
"""The manifest: the contents of ``model.toml``, validated and frozen.

Shapes are per item: items are stacked along a new dimension 0. With ``batchable = false`` a shape is the full
shape that the model is called with, one item at a time.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from gpuinfer.errors import ManifestError
from gpuinfer.models.specs import AudioSpec, Frozen, ImageSpec, InputSpec, OutputSpec, plain_file
from gpuinfer.names import MODEL_NAME

MANIFEST_FILE = "model.toml"
#: How an artefact is loaded.
Format = Literal["python", "torchscript", "export"]
#: Suffix of the artefact -> how it is loaded.
FORMATS: dict[str, Format] = {
    ".py": "python",
    **dict.fromkeys((".pt", ".jit", ".ts", ".pth", ".torchscript"), "torchscript"),
    ".pt2": "export",
}
_Seconds = Annotated[float, Field(gt=0, le=86400)]
_Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")]


class Manifest(Frozen):
    """The contents of ``model.toml``."""

    name: str
    description: str = ""
    #: A plain file name in the model's folder; its suffix decides how it is loaded.
    artefact: str
    #: The class of a Python model; needed if the file has several with a method predict.
    class_name: _Identifier | None = Field(None, alias="class")
    #: Passed to a Python model as ``ctx.parameters``.
    parameters: dict[str, Any] = Field(default_factory=dict)
    #: Imported before the artefact is loaded: libraries that register operators, such as torchvision.
    imports: tuple[_ModuleName, ...] = ()
    #: A method of the loaded model that is called before each pass, for example to reset its state.
    before_each: _Identifier | None = None
    #: Optional for a Python model, whose annotations may describe them.
    inputs: tuple[InputSpec, ...] = ()
    outputs: tuple[OutputSpec, ...] = ()
    #: False: the model has no batch dimension and is called with one item at a time.
    batchable: bool = True
    max_batch_size: int = Field(32, ge=1, le=65536)
    #: Idle workers share a burst of tasks only in batches of at least this size.
    min_batch_size: int = Field(1, ge=1, le=65536)
    #: How to run items of different shapes: in groups of one shape, or padded with zeros to the largest.
    variable: Literal["group", "pad"] = "group"
    #: The model is asked to stop at the soft limit; its worker is ended at the hard one.
    soft_time_limit_s: _Seconds = 30.0
    hard_time_limit_s: _Seconds = 60.0
    #: Maximum time limit that a request may set.
    max_time_limit_s: _Seconds = Field(default_factory=lambda data: data.get("hard_time_limit_s", 60.0))

    @property
    def format(self) -> Format:
        return FORMATS[Path(self.artefact).suffix]

    @field_validator("name")
    @classmethod
    def _good_name(cls, name: str) -> str:
        if not MODEL_NAME.fullmatch(name):
            raise ValueError("must be 1 to 64 of a-z 0-9 _ . - and begin with a letter or a digit")
        return name

    @field_validator("artefact")
    @classmethod
    def _plain_file(cls, artefact: str) -> str:
        if not plain_file(artefact):
            raise ValueError("must be the plain name of a file in the model's folder")
        if Path(artefact).suffix not in FORMATS:
            scripts = " ".join(suffix for suffix, name in FORMATS.items() if name == "torchscript")
            raise ValueError(f"must end in .py (Python), .pt2 (torch.export) or {scripts} (TorchScript)")
        return artefact

    @field_validator("inputs", "outputs")
    @classmethod
    def _names_differ(cls, specs: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise ValueError(f"names must differ, got {', '.join(names)}")
        return specs

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> Manifest:
        if self.format == "python":
            return self
        for key, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not specs:
                raise ValueError(f"{key} is missing: a table [[{key}]] for each of the model's {key}")
        for spec in self.inputs:
            if spec.kind != "tensor":
                raise ValueError(
                    f"inputs.{spec.name}.kind = {spec.kind!r}: {self.artefact} takes only tensors"
                )
        for key, value in (("class", self.class_name), ("parameters", self.parameters)):
            if value:
                raise ValueError(f"{key} is only for Python models, but {self.artefact} is not one")
        if self.before_each and self.format == "export":
            raise ValueError(f"before_each = {self.before_each!r}: a .pt2 file has no methods to call")
        return self

    @model_validator(mode="after")
    def _sizes_in_order(self) -> Manifest:
        if self.min_batch_size > self.max_batch_size:
            raise ValueError(
                f"min_batch_size must not exceed max_batch_size, got {self.min_batch_size}, "
                f"{self.max_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _limits_in_order(self) -> Manifest:
        if not self.soft_time_limit_s < self.hard_time_limit_s <= self.max_time_limit_s:
            raise ValueError(
                "limits: must be soft_time_limit_s < hard_time_limit_s <= max_time_limit_s, got "
                f"{self.soft_time_limit_s:g}, {self.hard_time_limit_s:g}, {self.max_time_limit_s:g}"
            )
        return self


def load_manifest(folder: Path) -> Manifest:
    """Read ``folder``'s ``model.toml``.

    Raises ManifestError naming the file, the key, its value and what would be right.
    """
    path = folder / MANIFEST_FILE
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise ManifestError(f"cannot be read: {exc}", str(path)) from exc
    except tomllib.TOMLDecodeError as exc:
        raise ManifestError(f"is not valid TOML: {exc}", str(path)) from exc
    try:
        return Manifest.model_validate(data)
    except ValidationError as exc:
        raise ManifestError("; ".join(_explain(exc, data)), str(path)) from None


_KNOWN_KEYS = sorted(
    {
        field.alias or key
        for cls in (Manifest, InputSpec, OutputSpec, ImageSpec, AudioSpec)
        for key, field in cls.model_fields.items()
    }
)


def _explain(exc: ValidationError, data: dict[str, Any]) -> list[str]:
    lines = []
    for error in exc.errors(include_url=False):
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "missing":
            lines.append(f"{key} is missing")
        elif error["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(error["loc"][-1]), _KNOWN_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            lines.append(f"{key} = {_short(error['input'])} is not a key of a manifest{hint}")
        elif error["type"] != "default_factory_not_called":
            # The message of a rule over several keys contains their values; do not print the whole table.
            value = "" if isinstance(error["input"], dict) else f" = {_short(error['input'])}"
            said = error["msg"].removeprefix("Value error, ")
            lines.append(f"{key}{value}: {said}" if key else said)
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
