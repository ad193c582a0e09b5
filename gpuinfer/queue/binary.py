# SPDX-License-Identifier: Apache-2.0
"""Results whose arrays are bytes behind the JSON, for a front that passes them on as bytes.

::

    {"status":"SUCCESS","result":{"outputs":{"y":0},…},…,"arrays":[[["outputs","y"],"float32",[3,224,224]]]}
    \\n
    the bytes of each array, little-endian, in C order

A 0 stands where an array belongs. JSON as we write it has no line break, so that the first one ends it. Small
arrays stand in the JSON, in base64: what is told on a reply channel needs no second look. Only who asks for
the encoding ``binary`` gets such a result, which Celery's own readers cannot read; ours make base64 of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import orjson

from gpuinfer.queue.arrays import BYTES, DTYPES, Placed, Raw, encoded, raw_of

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def split(result: Any) -> tuple[Any, list[Placed]]:
    """Take numpy's arrays, and bytes, out of a result. Returns a copy with a 0 in their places, and them."""
    found: list[Placed] = []
    return _without(result, (), found), found


def _without(value: Any, path: tuple[int | str, ...], found: list[Placed]) -> Any:
    kind = type(value)
    if kind is dict:
        return {name: _without(one, (*path, name), found) for name, one in value.items()}
    if kind is list:
        return [_without(one, (*path, place), found) for place, one in enumerate(value)]
    if kind is bytes:
        found.append(Placed(path, Raw(BYTES, (len(value),), value)))
        return 0
    if hasattr(value, "__array_interface__"):
        raw = raw_of(value)
        if raw is None:
            return value.tolist()
        found.append(Placed(path, raw))
        return 0
    return value


def size_of(placed: Sequence[Placed]) -> int:
    """Return how many bytes these arrays have together."""
    return sum(len(one.raw.data) for one in placed)


def table(placed: Sequence[Placed]) -> list[tuple[tuple[int | str, ...], str, tuple[int, ...]]]:
    """Return where arrays belong, and what they are, for ``arrays``."""
    return [(one.path, one.raw.dtype, one.raw.shape) for one in placed]


def join(head: bytes, placed: Sequence[Placed]) -> bytes:
    """Return a whole result: its JSON, and the bytes behind it."""
    return b"".join((head, b"\n", *(one.raw.data for one in placed)))


def inlined(rest: Any, placed: Sequence[Placed]) -> Any:
    """Return a result with its arrays in place, in base64. Changes ``rest``."""
    for path, raw in placed:
        whole = encoded(raw)
        rest = _put(rest, path, whole["b64"] if path and path[-1] == "b64" else whole)
    return rest


def read(meta: bytes, *, raw: bool) -> dict[str, Any] | None:
    """Return the JSON of such a result with its arrays in place; None for what is none.

    ``raw``: as ``Raw``, and bytes as they are, which lie in ``meta``; else in base64. Raises ValueError,
    TypeError, LookupError for what ``join`` has not made.
    """
    end = meta.find(b"\n")
    if end < 0:
        return None
    body = orjson.loads(meta[:end])
    if not isinstance(body, dict) or "arrays" not in body:
        return None
    at, whole = end + 1, memoryview(meta)
    placed = []
    for path, dtype, shape in body.pop("arrays"):
        length = _bytes_of(dtype, shape)
        if at + length > len(meta):
            raise ValueError("it is cut off")
        placed.append(Placed(tuple(path), Raw(dtype, tuple(shape), whole[at : at + length])))
        at += length
    if not raw:
        body["result"] = inlined(body["result"], placed)
        return body
    for path, one in placed:
        body["result"] = _put(body["result"], path, one.data if one.dtype == BYTES else one)
    return body


def _bytes_of(dtype: str, shape: Sequence[int]) -> int:
    if dtype == BYTES:
        return int(shape[0])
    if dtype not in DTYPES or min(shape, default=0) < 0:
        raise ValueError("no dtype or shape of an array")
    bits = re.sub(r"\D", "", dtype)
    return prod(shape) * (int(bits) // 8 if bits else 1)


def array_of(raw: Raw) -> Array:
    """Return an array that lies where its bytes do."""
    import numpy as np

    return np.frombuffer(raw.data, np.dtype(raw.dtype).newbyteorder("<")).reshape(raw.shape)


def _put(result: Any, path: Sequence[int | str], value: Any) -> Any:
    if not path:
        return value
    *way, last = path
    place = result
    for key in way:
        place = place[key]
    place[last] = value
    return result
