# SPDX-License-Identifier: Apache-2.0
"""The tables of a manifest that describe a model's inputs and outputs.

Shapes are per item, without the batch dimension.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64"
]
DTYPES: tuple[str, ...] = get_args(Dtype)

#: A free dimension in a shape.
FREE = -1
_Dimension = Annotated[int, Field(strict=True, ge=FREE)]
#: An input must not be called ``b64``: a mapping of names to values would look like an encoded tensor.
_TensorName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
_PerChannel = tuple[float, ...]
#: What a model gets for an input: an array, or (Python models only) a value of another kind.
Kind = Literal["tensor", "json", "text", "bytes", "image", "audio", "file"]
#: Suffixes of files with an example.
EXAMPLE_SUFFIXES = (".json", ".npy", ".png", ".jpg", ".jpeg", ".wav", ".txt")


class Frozen(BaseModel):
    """A table of a manifest: immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _no_empty_dimension(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if shape is not None and 0 in shape:
        raise ValueError("a dimension must be at least 1, or -1 for a free one")
    return shape


def plain_file(name: str) -> bool:
    """Tell whether ``name`` is a plain file name: without a folder, and not hidden."""
    return bool(name) and not name.startswith(".") and not re.search(r"[/\\\x00-\x1f]", name)


def shape_fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether ``shape`` is ``wanted``, where -1 stands for any length of at least 1."""
    if len(shape) != len(wanted):
        return False
    return all(have == want or (want == FREE and have > 0) for have, want in zip(shape, wanted, strict=True))


class ImageSpec(Frozen):
    """How an image file becomes a tensor: resize, invert, multiply by ``scale``, subtract ``mean``, divide by
    ``std``."""

    #: L is grey, with one channel; RGB has three.
    mode: Literal["L", "RGB"] = "L"
    #: Width and height in pixels.
    size: tuple[Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]]
    #: The order of the tensor's dimensions; HW has no channel dimension and needs mode L.
    layout: Literal["CHW", "HWC", "HW"] = "CHW"
    #: Pixels are 0..255 before this factor.
    scale: float = 1.0
    #: One value for all channels, or one per channel.
    mean: _PerChannel = (0.0,)
    std: _PerChannel = (1.0,)
    #: For a model that expects bright strokes on a dark background but gets ink on paper.
    invert: bool = False

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
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
            raise ValueError("std must not contain 0, as values are divided by it")
        return self


class AudioSpec(Frozen):
    """How a sound file becomes float32 samples in -1..1, (channels, samples): resampled, and mixed down."""

    #: Samples per second.
    rate: int = Field(16000, ge=1, le=768_000)
    channels: int = Field(1, ge=1, le=64)


class InputSpec(Frozen):
    """One input of a model."""

    name: _TensorName
    kind: Kind = "tensor"
    dtype: Dtype = "float32"
    #: Per item; -1 is a free dimension, () is a scalar. Required for a tensor.
    shape: tuple[_Dimension, ...] = ()
    #: Whether NaN and infinity are accepted.
    allow_nan: bool = False
    #: If set, an image file may be sent in place of the tensor.
    image: ImageSpec | None = None
    #: If set, a sound file may be sent in place of the tensor. For kind audio: how it is resampled.
    audio: AudioSpec | None = None
    #: JSON schema of a value of kind json.
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    #: A value as in a request, or a file in the model's folder: for warm-up, documentation and checks.
    example: Any = None
    example_file: str | None = None
    #: The length of free dimensions in a warm-up without an example.
    warm_up_length: int | None = Field(default=None, ge=1, le=1 << 30, strict=True)

    _shape = field_validator("shape")(_no_empty_dimension)

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name == "b64":
            raise ValueError('must not be "b64", the key of an encoded tensor')
        return name

    @field_validator("example_file")
    @classmethod
    def _an_example_file(cls, name: str | None) -> str | None:
        if name is not None and (not plain_file(name) or Path(name).suffix.lower() not in EXAMPLE_SUFFIXES):
            raise ValueError(
                f"must be a file in the model's folder that ends in {', '.join(EXAMPLE_SUFFIXES)}"
            )
        return name

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> InputSpec:
        given = self.model_fields_set
        if self.kind == "tensor" and "shape" not in given:
            raise ValueError("shape is missing: a list of lengths, -1 for a free one; [] is a single number")
        for keys, kinds in (
            (("dtype", "shape", "allow_nan", "image"), ("tensor",)),
            (("audio", "warm_up_length"), ("tensor", "audio")),
            (("json_schema",), ("json",)),
        ):
            for key in keys:
                if key in given and self.kind not in kinds:
                    said = "schema" if key == "json_schema" else key
                    raise ValueError(
                        f"{said} is for kind = {' or '.join(map(repr, kinds))}, not {self.kind!r}"
                    )
        if self.example is not None and self.example_file is not None:
            raise ValueError("example and example_file are both given: give one")
        if self.warm_up_length is not None and self.kind == "tensor" and self.fixed:
            raise ValueError("warm_up_length is the length of free dimensions (-1), and the shape has none")
        return self

    @model_validator(mode="after")
    def _image_fits(self) -> InputSpec:
        if self.image and not shape_fits(self.image.shape, self.shape):
            raise ValueError(f"image makes shape {list(self.image.shape)}, not {list(self.shape)}")
        if self.image and self.dtype == "bool":
            raise ValueError("image makes numbers: dtype must be a float or an integer type")
        return self

    @model_validator(mode="after")
    def _audio_fits(self) -> InputSpec:
        if self.audio is None or self.kind != "tensor":
            return self
        if self.image:
            raise ValueError("image and audio are both given: a tensor is made from one kind of file")
        if "float" not in self.dtype:
            raise ValueError(f"audio makes fractions: dtype must be a float type, not {self.dtype}")
        alone = self.audio.channels == 1 and len(self.shape) == 1
        if not alone and not (len(self.shape) == 2 and self.shape[0] in (FREE, self.audio.channels)):
            raise ValueError(f"audio makes shape [{self.audio.channels}, samples], not {list(self.shape)}")
        return self

    @property
    def fixed(self) -> bool:
        """Whether no dimension is free."""
        return FREE not in self.shape


class OutputSpec(Frozen):
    """One output of a model."""

    name: _TensorName
    #: classification: a vector of scores becomes class, label, confidence; raw: the tensor itself.
    kind: Literal["raw", "classification"] = "raw"
    #: Checked by warm-up if set. The shape is per item.
    dtype: Dtype | None = None
    shape: tuple[_Dimension, ...] | None = None
    #: One per class, in order; without labels, classes are named by their numbers.
    labels: tuple[str, ...] = ()
    #: How many of the best classes a result has, unless the request says otherwise.
    top_k: int = Field(3, ge=1, le=1000)
    #: softmax: the model gives logits; none: its scores are confidences already.
    activation: Literal["none", "softmax"] = "none"

    _shape = field_validator("shape")(_no_empty_dimension)

    @model_validator(mode="after")
    def _kind_fits(self) -> OutputSpec:
        if self.kind == "raw" and (self.labels or self.activation != "none"):
            raise ValueError('labels and activation are for kind = "classification"')
        return self
