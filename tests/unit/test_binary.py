# SPDX-License-Identifier: Apache-2.0
"""Results whose arrays are bytes behind the JSON."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest

from gpuinfer.errors import UnreadableResult
from gpuinfer.models.answers import to_json
from gpuinfer.queue import binary, results
from gpuinfer.queue.arrays import BESIDE_BYTES, Raw

pytestmark = pytest.mark.unit

LARGE = np.arange(BESIDE_BYTES, dtype=np.float32).reshape(4, -1)


def written(result: Any) -> bytes:
    return results.success_in_bytes("t", result, worker="w", about={"model": "m"}, caller="alice")


def test_large_arrays_are_not_base64() -> None:
    """As they lie in memory, behind the JSON; read where they lie, or as base64; the rest is as ever."""
    job: list[Any] = [
        {"outputs": {"y": LARGE, "z": np.array([[1.5]])}, "model": "m"},
        {"error": {"code": "x"}},
    ]
    meta = written(job)
    assert len(meta) < LARGE.nbytes + 500
    assert LARGE.tobytes() in meta
    assert results.caller_of(meta) == "alice"
    status = results.parse("t", meta, raw=True)
    first, second = status.result
    assert (second, status.about["model"], status.state) == ({"error": {"code": "x"}}, "m", "completed")
    y = binary.array_of(first["outputs"]["y"])
    assert np.shares_memory(y, np.frombuffer(meta, np.uint8))
    np.testing.assert_array_equal(y, LARGE)
    assert binary.array_of(first["outputs"]["z"]).tolist() == [[1.5]]
    told = results.parse("t", meta).result[0]["outputs"]
    assert orjson.loads(orjson.dumps(told["z"])) == {
        "b64": "AAAAAAAA+D8=",
        "dtype": "float64",
        "shape": [1, 1],
    }
    assert results.notice("t", meta).startswith(b'{"status":"SUCCESS","caller":"alice","beside":')
    assert isinstance(job[0]["outputs"]["y"], np.ndarray), "what was given is as it was"


def test_small_ones_stand_in_the_json() -> None:
    """So that who waits is told them without a second look."""
    meta = written({"outputs": {"y": np.array([1])}})
    assert orjson.loads(meta)["result"]["outputs"]["y"]["dtype"] == "int64"


def test_white_space_is_no_end() -> None:
    """An array whose bytes are spaces and line breaks, which JSON may end with."""
    array = np.full((2, BESIDE_BYTES), 0x20, np.uint8)
    array[0, 0] = 0x0A
    found = results.parse("t", written({"a": array}), raw=True).result["a"]
    np.testing.assert_array_equal(binary.array_of(found), array)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "float16", "int32", "uint32", "float32", "int64", "float64"]
)
def test_every_dtype(dtype: str) -> None:
    """Of any shape, also empty ones and scalars, of a view, and of another byte order."""
    for array in (
        np.ones((2, BESIDE_BYTES), dtype)[:, ::2],
        np.ones((0, 3), dtype),
        np.ones((), dtype),
        np.ones(3, np.dtype(dtype).newbyteorder(">")),
    ):
        meta = written({"a": array, "big": LARGE})
        found = results.parse("t", meta, raw=True).result["a"]
        assert isinstance(found, Raw)
        np.testing.assert_array_equal(binary.array_of(found), array)


def test_a_python_models_bytes() -> None:
    """Bytes lie there, too, and are bytes, or base64 in place of them."""
    content = bytes(range(256)) * 512
    meta = written({"output": to_json({"file": content, "name": "x"}, "binary")})
    assert content in meta
    assert results.parse("t", meta, raw=True).result["output"]["file"]["b64"] == content
    assert base64.b64decode(results.parse("t", meta).result["output"]["file"]["b64"]) == content


@pytest.mark.parametrize(
    "meta",
    [
        written({"a": LARGE})[:-1],
        b'{"status":"SUCCESS","arrays":[[["a"],"float32",[1]]],"result":{}}\n',
        b'{"status":"SUCCESS","arrays":[[["a","b"],"int8",[1]]],"result":{"a":0}}\nx',
        b'{"status":"SUCCESS","arrays":[[["a"],"object",[1]]],"result":{"a":0}}\nx',
        b'{"status":"SUCCESS","arrays":[[["a"],"int8",[-1]]],"result":{"a":0}}\nx',
        b'{"status":"SUCCESS","arrays":3,"result":{"a":0}}\nx',
        b"[1]\nx",
        b"x\nx",
    ],
)
def test_what_is_no_such_result(meta: bytes) -> None:
    """It is told as what it is: somebody else's."""
    for raw in (False, True):
        with pytest.raises(UnreadableResult):
            results.parse("t", meta, raw=raw)
