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
from gpuinfer.models.images import image_to_array, open_image
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.repository import Repository
from gpuinfer.models.shipped import load_test_images
from gpuinfer.models.specs import InputSpec
from gpuinfer.models.tensors import decode_batch

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


def _bomb(side: int) -> bytes:
    """Return a picture of side x side black pixels, a thousandth of its size."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_bomb(9000), "has 9000 x 9000 pixels; at most"),
        (_bomb(14000), "pixels"),
        (GREY[:-30], "cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"", "not an image in a known format"),
    ],
)
def test_a_hostile_image_is_its_own_error(data: bytes, words: str) -> None:
    """Too many pixels, cut off, a format that another program would unpack: the others of the batch go on."""
    image = {"size": [2, 2], "scale": 1 / 255}
    manifest = Manifest.model_validate(
        {
            "name": "m",
            "artefact": "m.pt",
            "inputs": [{"name": "x", "shape": [1, 2, 2], "image": image}],
            "outputs": [{"name": "y"}],
        }
    )
    first, bad, last = decode_batch(manifest, [GREY, data, [[[0, 1], [0, 1]]]])
    assert isinstance(first, tuple)
    assert isinstance(last, tuple)
    assert isinstance(bad, InputError)
    assert words in bad.message
    assert bad.field == "inputs"
    with pytest.raises(InputError, match=r"pixels|image"):
        open_image(data, "inputs")


def test_a_large_photo_is_unpacked_small() -> None:
    """A JPEG that is much larger than what is wanted gives the same picture, to a grey level or two."""
    slope = np.add.outer(np.arange(1600), np.arange(1200)) * 255 // 2800
    buffer = io.BytesIO()
    Image.fromarray(slope.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    array = image_to_array(buffer.getvalue(), _spec([8, 6], size=[6, 8], layout="HW"))
    wanted = slope.reshape(8, 200, 6, 200).mean(axis=(1, 3))
    assert np.abs(array - wanted).max() < 3
