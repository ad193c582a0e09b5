# SPDX-License-Identifier: Apache-2.0
"""A result by itself: which content type it has, and which one a caller gets."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import orjson
import pytest

from gpuinfer.api import accept
from gpuinfer.api.bare import bare
from gpuinfer.errors import NotAcceptable
from gpuinfer.models.tensors import encode_array

pytestmark = pytest.mark.unit

NPY = "application/x-npy"


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", "image/png"),
        ("*/*", "image/png"),
        ("application/json", "application/json"),
        ("text/html, image/*;q=0.9, application/json;q=0.8", "image/png"),
        ("image/*;q=0.2, */*;q=0.5", "application/json"),
        ("image/png;q=0, */*", "application/json"),
        ("application/json;q=x, image/png;q=0.1", "image/png"),
        ("nonsense", "image/png"),
        ("text/html", None),
    ],
)
def test_what_is_wanted_most(header: str, wanted: str | None) -> None:
    """The most exact range counts for a type; of equals the type that is offered first."""
    assert accept.best(header, ["image/png", "application/json"]) == wanted


@pytest.mark.parametrize(
    ("output", "media_type"),
    [
        ("text", "text/plain; charset=utf-8"),
        ({"b64": "AAE="}, "application/octet-stream"),
        ({"b64": "AAE=", "type": "audio/wav"}, "audio/wav"),
        ({"b64": "AAE=", "type": "text/html"}, "application/octet-stream"),
        ({"b64": "AAE=", "type": "image/svg+xml"}, "application/octet-stream"),
        ({"b64": "AAE=", "type": 7}, "application/octet-stream"),
        ({"b64": "no base64!"}, "application/json"),
        ({"b64": 7}, "application/json"),
        ({"a": "text"}, "application/json"),
        ([1, 2], "application/json"),
        (None, "application/json"),
    ],
)
def test_the_type_of_an_answer(output: Any, media_type: str) -> None:
    """Nothing that a browser would run is called what the model calls it; JSON has all of the result."""
    result = {"output": output, "model": "m", "device": "cpu"}
    found = bare(result, "*/*")
    assert found.media_type == media_type
    if media_type == "application/json":
        assert orjson.loads(found.content) == result
    elif isinstance(output, dict):
        assert found.content == b"\0\1"


@pytest.mark.parametrize(
    ("result", "array"),
    [
        ({"output": encode_array(np.array([[1, 2]], np.float32), "b64")}, np.array([[1, 2]], np.float32)),
        ({"output": [[1, 2], [3, 4]]}, np.array([[1, 2], [3, 4]])),
        ({"output": [1.5, None]}, np.array([1.5, np.nan])),
        ({"output": 7}, np.array(7)),
        ({"outputs": {"y": [0.1, 0.2]}, "model": "m", "device": "cpu"}, np.array([0.1, 0.2], np.float32)),
        ([{"outputs": {"y": [0.1]}}, {"outputs": {"y": [0.2]}}], np.array([[0.1], [0.2]], np.float32)),
    ],
)
def test_an_array_is_a_file_of_numpys(result: Any, array: Any) -> None:
    """Of the model's dtype where that is known; a job's result is one array of all."""
    for name in (NPY, "application/npy", f"application/json;q=0.5, {NPY}"):
        found = bare(result, name, {"y": "float32"})
        assert found.media_type == NPY
        loaded = np.load(io.BytesIO(found.content), allow_pickle=False)
        np.testing.assert_array_equal(loaded, array)
        assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
    assert bare(result).media_type == "application/json"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"output": [[1], [2, 3]]}, "not an array of numbers"),
        ({"output": {"b64": "x", "dtype": "float32", "shape": [1]}}, "several values"),
        ({"output": {"b64": "", "dtype": "object", "shape": [0]}}, "several values"),
        ({"outputs": {"x": [1], "y": [2]}}, r"several values \(x, y\)"),
        ({"class": 2, "label": "2", "confidence": 1.0}, "several values"),
        ([{"outputs": {"y": [1]}}, {"error": {"code": "x"}}], "not an array"),
        ("text", "not an array"),
        (None, "not an array"),
    ],
)
def test_what_is_no_array(result: Any, words: str) -> None:
    """It is refused as such, unless another type will do."""
    with pytest.raises(NotAcceptable, match=words):
        bare(result, NPY)
    assert bare(result, f"{NPY}, application/json;q=0.1").media_type == "application/json"
