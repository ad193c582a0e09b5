# SPDX-License-Identifier: Apache-2.0
"""Results with their arrays as bytes after the JSON, for a front that passes them on as bytes.

::

    {"status":"SUCCESS","result":{"outputs":{"y":0},…},…,"arrays":[[["outputs","y"],"float32",[3,224,224]]]}
    \\n
    the bytes of each array, little-endian, in C order

The place of an array in the JSON holds a 0. The JSON that we write has no line break, so the first one ends
it. Small arrays are part of the JSON, in base64, so that a result on a reply channel is complete. Only a task
with the encoding ``binary`` gets such a result. Celery's own readers cannot read it; ours convert to base64.
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
    """Take numpy arrays and bytes out of a result. Returns a copy with a 0 in the place of each, and them."""
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
    """Return the total bytes of these arrays."""
    return sum(len(one.raw.data) for one in placed)


def table(placed: Sequence[Placed]) -> list[tuple[tuple[int | str, ...], str, tuple[int, ...]]]:
    """Return (path, dtype, shape) of each array, for the field ``arrays``."""
    return [(one.path, one.raw.dtype, one.raw.shape) for one in placed]


def join(head: bytes, placed: Sequence[Placed]) -> bytes:
    """Return a whole result: its JSON, followed by the arrays' bytes."""
    return b"".join((head, b"\n", *(one.raw.data for one in placed)))


def inlined(rest: Any, placed: Sequence[Placed]) -> Any:
    """Return a result with its arrays in place, in base64. Changes ``rest``."""
    for path, raw in placed:
        whole = encoded(raw)
        rest = _put(rest, path, whole["b64"] if path and path[-1] == "b64" else whole)
    return rest


def read(meta: bytes, *, raw: bool) -> dict[str, Any] | None:
    """Return the JSON of such a result with its arrays in place; None for a result of another form.

    ``raw``: arrays are ``Raw`` and bytes are views of ``meta``; otherwise both are base64. Raises ValueError,
    TypeError or LookupError for a result that ``join`` did not make.
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
            raise ValueError("the result is truncated")
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
        raise ValueError("invalid dtype or shape")
    bits = re.sub(r"\D", "", dtype)
    return prod(shape) * (int(bits) // 8 if bits else 1)


def array_of(raw: Raw) -> Array:
    """Return a numpy array that shares these bytes."""
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
