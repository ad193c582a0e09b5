# SPDX-License-Identifier: Apache-2.0
"""The manifest: what ``model.toml`` may say, checked once, frozen.

Shapes are per item, without the batch dimension; the loader stacks items along a new dimension 0.
With ``batchable = false`` a shape is the full shape the model is called with, one item at a time.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gpuinfer.errors import ManifestError

MANIFEST_FILE = "model.toml"
#: What a model may be called; it is the name of its folder too.
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
#: Suffix of the artefact -> how it is loaded.
FORMATS: dict[str, Literal["torchscript", "export"]] = {".pt": "torchscript", ".pt2": "export"}

Dtype = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64"
]
DTYPES: tuple[str, ...] = get_args(Dtype)

#: A free dimension in a shape.
FREE = -1
_Dimension = Annotated[int, Field(strict=True, ge=FREE)]
#: ``b64`` would be taken for an encoded tensor where a request maps names to values.
_TensorName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
_Seconds = Annotated[float, Field(gt=0, le=86400)]
_PerChannel = tuple[float, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _no_empty_dimension(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if shape is not None and 0 in shape:
        raise ValueError("a dimension must be at least 1, or -1 for a free one")
    return shape


def shape_fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether ``shape`` is ``wanted``, where -1 stands for any length of at least 1."""
    if len(shape) != len(wanted):
        return False
    return all(have == want or (want == FREE and have > 0) for have, want in zip(shape, wanted, strict=True))


class ImageSpec(_Frozen):
    """How an image file becomes a tensor: resize, invert, times ``scale``, minus ``mean``, over ``std``."""

    #: L is grey, one channel; RGB is three.
    mode: Literal["L", "RGB"] = "L"
    #: Width and height in pixels.
    size: tuple[Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]]
    #: The order of the tensor's dimensions; HW has no channel dimension and needs mode L.
    layout: Literal["CHW", "HWC", "HW"] = "CHW"
    #: Pixels are 0..255 before this factor.
    scale: float = 1.0
    #: One value for all channels, or one a channel.
    mean: _PerChannel = (0.0,)
    std: _PerChannel = (1.0,)
    #: For models that expect bright strokes on a dark ground and get ink on paper.
    invert: bool = False

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor this makes."""
        width, height = self.size
        if self.layout == "HW":
            return (height, width)
        return (self.channels, height, width) if self.layout == "CHW" else (height, width, self.channels)

    @model_validator(mode="after")
    def _consistent(self) -> ImageSpec:
        if self.layout == "HW" and self.mode != "L":
            raise ValueError('layout "HW" has no place for colour: use mode "L", or layout "CHW" or "HWC"')
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} must have 1 or {self.channels} values, not {len(values)}")
        if 0 in self.std:
            raise ValueError("std must not hold 0, it is divided by")
        return self


class TensorSpec(_Frozen):
    """One input of a model."""

    name: _TensorName
    dtype: Dtype = "float32"
    #: Per item; -1 is free, () is a scalar.
    shape: tuple[_Dimension, ...]
    #: Whether NaN and infinity may pass.
    allow_nan: bool = False
    #: Where it is given, ``gpuinfer model run`` takes an image file for this input.
    image: ImageSpec | None = None

    _shape = field_validator("shape")(_no_empty_dimension)

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name == "b64":
            raise ValueError('must not be "b64", the key of an encoded tensor')
        return name

    @model_validator(mode="after")
    def _image_fits(self) -> TensorSpec:
        if self.image and not shape_fits(self.image.shape, self.shape):
            raise ValueError(f"image makes shape {list(self.image.shape)}, not {list(self.shape)}")
        if self.image and self.dtype == "bool":
            raise ValueError("image makes numbers: dtype must be a float or an integer type")
        return self

    @property
    def fixed(self) -> bool:
        """True when no dimension is free."""
        return FREE not in self.shape


class OutputSpec(_Frozen):
    """One output of a model."""

    name: _TensorName
    #: classification: a vector of scores becomes class, label, confidence; raw: the tensor itself.
    kind: Literal["raw", "classification"] = "raw"
    #: What warm-up must find; without them it does not look. Shape is per item.
    dtype: Dtype | None = None
    shape: tuple[_Dimension, ...] | None = None
    #: One a class, in order; a class without a label is called by its number.
    labels: tuple[str, ...] = ()
    #: How many of the best classes a result names, unless the request says otherwise.
    top_k: int = Field(3, ge=1, le=1000)
    #: softmax: the model gives logits; none: its scores are confidences already.
    activation: Literal["none", "softmax"] = "none"

    _shape = field_validator("shape")(_no_empty_dimension)

    @model_validator(mode="after")
    def _kind_fits(self) -> OutputSpec:
        if self.kind == "raw" and (self.labels or self.activation != "none"):
            raise ValueError('labels and activation are for kind = "classification"')
        return self


class Manifest(_Frozen):
    """What ``model.toml`` says."""

    name: str
    description: str = ""
    #: A plain file name in the model's folder.
    artefact: str
    #: Of the artefact, in hexadecimal.
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[OutputSpec, ...] = Field(min_length=1)
    #: False: the model knows no batch dimension and is called with one item at a time.
    batchable: bool = True
    max_batch_size: int = Field(32, ge=1, le=65536)
    #: Idle workers share a burst down to batches of this size: below it, sharing saves no time.
    min_batch_size: int = Field(1, ge=1, le=65536)
    #: Items whose free dimensions differ: run in groups of one shape, or padded with zeros to the largest.
    variable: Literal["group", "pad"] = "group"
    #: The model is asked to stop at the soft limit; its worker is ended at the hard one.
    soft_time_limit_s: _Seconds = 30.0
    hard_time_limit_s: _Seconds = 60.0
    #: The most a request may ask for.
    max_time_limit_s: _Seconds = Field(default_factory=lambda data: data.get("hard_time_limit_s", 60.0))

    @property
    def format(self) -> Literal["torchscript", "export"]:
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
        if not artefact or artefact.startswith(".") or re.search(r"[/\\\x00-\x1f]", artefact):
            raise ValueError("must be the plain name of a file in the model's folder")
        if Path(artefact).suffix not in FORMATS:
            raise ValueError("must end in .pt (TorchScript) or .pt2 (torch.export)")
        return artefact

    @field_validator("inputs", "outputs")
    @classmethod
    def _names_differ(cls, specs: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise ValueError(f"names must differ, got {', '.join(names)}")
        return specs

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
                "must be soft_time_limit_s < hard_time_limit_s <= max_time_limit_s, got "
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
    {key for cls in (Manifest, TensorSpec, OutputSpec, ImageSpec) for key in cls.model_fields}
)


def _explain(exc: ValidationError, data: dict[str, Any]) -> list[str]:
    lines = []
    for error in exc.errors(include_url=False):
        key = ".".join(str(part) for part in error["loc"]) or "limits"
        if error["type"] == "missing":
            lines.append(f"{key} is missing")
        elif error["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(error["loc"][-1]), _KNOWN_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            lines.append(f"{key} = {_short(error['input'])} is no key of a manifest{hint}")
        elif error["type"] != "default_factory_not_called":
            # A rule over several keys names their values itself; the whole table would say less.
            value = "" if isinstance(error["input"], dict) else f" = {_short(error['input'])}"
            lines.append(f"{key}{value}: {error['msg'].removeprefix('Value error, ')}")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
