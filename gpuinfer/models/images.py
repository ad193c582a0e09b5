# SPDX-License-Identifier: Apache-2.0
"""An image file becomes a tensor, as the manifest's ``image`` table says."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from gpuinfer.errors import InputError
from gpuinfer.models.specs import ImageSpec, InputSpec
from gpuinfer.models.tensors import Array


def image_to_array(source: Path | str | bytes, spec: InputSpec) -> Array:
    """Read an image (any format Pillow knows) into an array of ``spec``'s dtype and image shape.

    Turned upright by its EXIF tag, set on the ground that becomes dark where it is transparent, resized
    by area to ``size``, inverted if asked, then ``(pixel * scale - mean) / std``; integers are rounded.
    bfloat16 comes as float32, to be decoded. Raises InputError when the file is no such image.
    """
    if spec.image is None:
        raise InputError(
            "is no image for the model: its manifest has no [inputs.image]", f"inputs.{spec.name}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pixels = _pixels(io.BytesIO(source) if isinstance(source, bytes) else source, spec.image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as exc:
        raise InputError(f"cannot be read as an image: {exc}", f"inputs.{spec.name}") from exc
    return _converted(_laid_out(pixels, spec.image), spec)


def _pixels(source: Path | str | io.BytesIO, image: ImageSpec) -> Array:
    """Return float64 values of 0..255, (height, width, channels)."""
    with Image.open(source) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            ground = Image.new("RGBA", picture.size, "white" if image.invert else "black")
            picture = Image.alpha_composite(ground, picture.convert("RGBA"))
        elif picture.mode.startswith("I;16"):
            # Pillow would cut 16 bits off at 255 instead of scaling them.
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        picture = picture.convert(image.mode)
        if picture.size != image.size:
            picture = picture.resize(image.size, Image.Resampling.BOX)
        values = np.asarray(picture, dtype=np.float64)
    values = 255.0 - values if image.invert else values
    return values.reshape(image.size[1], image.size[0], image.channels)


def _laid_out(values: Array, image: ImageSpec) -> Array:
    values = (values * image.scale - np.array(image.mean)) / np.array(image.std)
    if image.layout == "CHW":
        return values.transpose(2, 0, 1)
    return values[..., 0] if image.layout == "HW" else values


def _converted(values: Array, spec: InputSpec) -> Array:
    dtype: np.dtype[Any] = np.dtype(np.float32 if spec.dtype == "bfloat16" else spec.dtype)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = values.round().clip(info.min, info.max)
    return np.ascontiguousarray(values, dtype=dtype)
