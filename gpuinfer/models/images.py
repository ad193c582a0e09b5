# SPDX-License-Identifier: Apache-2.0
"""Turns an image file into a tensor, as the manifest's ``image`` table says."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from gpuinfer.errors import InputError
from gpuinfer.models.specs import ImageSpec, InputSpec

#: The accepted formats. Pillow knows others, some of which it passes to other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
#: A picture with more pixels is refused before it is unpacked, as a small file may unpack to gigabytes.
MAX_PIXELS = 64 * 1024 * 1024


@cache
def _formats() -> tuple[str, ...]:
    """Return those of ``FORMATS`` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(source: Path | str | bytes | memoryview, field: str) -> Image.Image:
    """Return a picture, unpacked and turned upright by its EXIF tag.

    Raises InputError if it is not a picture, is incomplete, or has more than ``MAX_PIXELS``.
    """
    return _open(source, field, None)


def picture_of(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return the picture of pixels that are (height, width) or (height, width, 3 or 4)."""
    return Image.fromarray(pixels)


def _open(source: Path | str | bytes | memoryview, field: str, wanted: ImageSpec | None) -> Image.Image:
    file = source if isinstance(source, Path | str) else io.BytesIO(source)
    try:
        with Image.open(file, formats=_formats()) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise InputError(f"has {width} x {height} pixels; at most {MAX_PIXELS} are allowed", field)
            if wanted is not None:  # if that is enough, unpack a JPEG at a half to an eighth of its size
                enough = 2 * max(wanted.size)
                opened.draft(wanted.mode, (enough, enough))
            opened.load()
            return ImageOps.exif_transpose(opened)
    except InputError:
        raise
    except Exception as exc:  # Pillow may raise any exception for a damaged file
        raise InputError(f"cannot be read as an image: {_plain(exc)}", field) from exc


def _plain(exc: Exception) -> str:
    """Return Pillow's message, or a clearer one for an unknown format."""
    return "it is not an image in a known format" if isinstance(exc, UnidentifiedImageError) else str(exc)


def image_to_array(source: Path | str | bytes | memoryview, spec: InputSpec, field: str = "") -> NDArray[Any]:
    """Read an image (of one of ``FORMATS``) into an array of ``spec``'s dtype and image shape.

    The image is turned upright by its EXIF tag; transparent parts get the background that becomes dark. It is
    resized by area to ``size`` and inverted if ``invert`` is set; then ``(pixel * scale - mean) / std``, with
    integers rounded. bfloat16 is returned as float32. Raises InputError if the file cannot be read.
    """
    if spec.image is None:
        raise InputError(
            "must not be an image: the model's manifest has no [inputs.image]", f"inputs.{spec.name}"
        )
    field = field or f"inputs.{spec.name}"
    picture = _open(source, field, spec.image)
    try:
        pixels = _pixels(picture, spec.image)
    except (OSError, ValueError) as exc:
        raise InputError(f"cannot be read as an image: {exc}", field) from exc
    return _converted(_laid_out(pixels, spec.image), spec)


def _pixels(picture: Image.Image, image: ImageSpec) -> NDArray[Any]:
    """Return float64 values of 0..255, (height, width, channels)."""
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, "white" if image.invert else "black")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    elif picture.mode.startswith("I;16"):
        # Pillow would clip 16-bit values at 255 instead of scaling them.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert(image.mode)
    if picture.size != image.size:
        picture = picture.resize(image.size, Image.Resampling.BOX)
    values = np.asarray(picture, dtype=np.float64)
    values = 255.0 - values if image.invert else values
    return values.reshape(image.size[1], image.size[0], image.channels)


def _laid_out(values: NDArray[Any], image: ImageSpec) -> NDArray[Any]:
    values = (values * image.scale - np.array(image.mean)) / np.array(image.std)
    if image.layout == "CHW":
        return values.transpose(2, 0, 1)
    return values[..., 0] if image.layout == "HW" else values


def _converted(values: NDArray[Any], spec: InputSpec) -> NDArray[Any]:
    dtype: np.dtype[Any] = np.dtype(np.float32 if spec.dtype == "bfloat16" else spec.dtype)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = values.round().clip(info.min, info.max)
    return np.ascontiguousarray(values, dtype=dtype)
