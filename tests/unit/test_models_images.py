# SPDX-License-Identifier: Apache-2.0
"""An image becomes the tensor its manifest describes, or a clear error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpuinfer.errors import InputError
from gpuinfer.models.images import image_to_array
from gpuinfer.models.repository import Repository
from gpuinfer.models.shipped import load_test_images
from gpuinfer.models.specs import InputSpec

pytestmark = pytest.mark.unit


def _spec(shape: list[int], dtype: str = "float32", **image: Any) -> InputSpec:
    return InputSpec.model_validate({"name": "x", "shape": shape, "dtype": dtype, "image": image})


def _png(pixels: object, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8), mode).save(buffer, "PNG")
    return buffer.getvalue()


GREY = _png([[0, 255], [51, 102]])
RED = _png([[[255, 0, 0]]])


def test_grey(tmp_path: Path) -> None:
    """Scale, mean and std apply in that order; a path and bytes give the same."""
    spec = _spec([1, 2, 2], size=[2, 2], scale=1 / 255, mean=[0.2], std=[0.5])
    array = image_to_array(GREY, spec)
    np.testing.assert_allclose(array, [[[-0.4, 1.6], [0, 0.4]]], atol=1e-6)
    assert array.dtype == np.float32
    file = tmp_path / "a.png"
    file.write_bytes(GREY)
    assert np.array_equal(image_to_array(file, spec), array)


@pytest.mark.parametrize(
    ("layout", "shape"), [("CHW", [3, 1, 1]), ("HWC", [1, 1, 3])]
)  # fmt: skip
def test_colour_layouts(layout: str, shape: list[int]) -> None:
    """Channels come first or last, with a mean of their own."""
    spec = _spec(shape, size=[1, 1], mode="RGB", layout=layout, mean=[5, 0, -1])
    assert image_to_array(RED, spec).ravel().tolist() == [250, 0, 1]
    assert image_to_array(RED, spec).shape == tuple(shape)


def test_width_comes_first_in_size() -> None:
    """size is width and height, a tensor's dimensions are height and width."""
    assert image_to_array(GREY, _spec([2, 3], size=[3, 2], layout="HW")).shape == (2, 3)


def test_invert_integers_and_resize() -> None:
    """Ink on paper becomes bright on dark; integers are rounded; shrinking averages."""
    spec = _spec([1, 1], "uint8", size=[1, 1], layout="HW", invert=True)
    # The mean is 102; Pillow rounds once along each axis.
    assert abs(int(image_to_array(GREY, spec)[0, 0]) - 153) <= 1
    assert image_to_array(GREY, spec).dtype == np.uint8


@pytest.mark.parametrize("invert", [False, True])
def test_transparent_ground_becomes_dark(invert: bool) -> None:
    """What is transparent ends as zero, whichever way round the model sees it."""
    spec = _spec([1, 1], size=[1, 1], layout="HW", invert=invert)
    assert image_to_array(_png([[[90, 90, 90, 0]]]), spec).tolist() == [[0]]


def test_sixteen_bits() -> None:
    """A 16-bit image is scaled, not cut off."""
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0x8000]], np.uint16)).save(buffer, "PNG")
    assert image_to_array(buffer.getvalue(), _spec([1, 1], size=[1, 1], layout="HW")).tolist() == [[128]]


@pytest.mark.parametrize("content", [b"", b"no image", GREY[:40]])
def test_no_image_is_an_input_error(content: bytes) -> None:
    """Garbage, and an image cut short, name the input."""
    with pytest.raises(InputError, match="cannot be read as an image") as caught:
        image_to_array(content, _spec([1, 2, 2], size=[2, 2]))
    assert caught.value.field == "inputs.x"


def test_a_manifest_without_image() -> None:
    """A model that takes no image says so."""
    with pytest.raises(InputError, match=r"no \[inputs\.image\]"):
        image_to_array(GREY, InputSpec(name="x", shape=(2,)))


def test_digits_survive_a_png() -> None:
    """A digit of 0..16 drawn as 0..255 comes back as it was, within the rounding of a pixel."""
    images, _ = load_test_images()
    pixels = (images[0, 0] * 255 / 16).round()
    array = image_to_array(_png(pixels), Repository([]).get("digits").manifest.inputs[0])
    np.testing.assert_allclose(array, images[0], atol=0.04)
