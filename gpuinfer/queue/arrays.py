# SPDX-License-Identifier: Apache-2.0
"""How arrays and files travel from a caller to a worker: as bytes, never as lists of numbers.

A small array is part of the message, as ``{"b64", "dtype", "shape"}``; small bytes are ``{"b64"}``. A large
body is stored beside the list, under a key of its own::

    4 bytes   length of the head, little-endian
    head      JSON: {"inputs": ..., "arrays": [[path, dtype, shape], ...]}, then spaces
    arrays    the bytes of each, little-endian, in C order, then zeros

Each array begins at a multiple of 16 bytes (the head at 4), so numpy can use it without a copy. A path names
the keys that lead to an array's place in the inputs, which holds a 0. Bytes are an array of dtype "bytes".

Arrays may be numpy's, torch's, or any object with ``__array__``, ``shape`` and ``dtype``. numpy is imported
only once there is an array; torch never is.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from gpuinfer.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

#: A larger body is stored beside the list, where it does not pass through Lua.
BESIDE_BYTES = 64 * 1024
#: The dtypes of arrays that travel as bytes.
DTYPES = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    }
)
#: The dtype of bytes that are not an array, such as a file.
BYTES = "bytes"
_ALIGNED = 16
_BYTES_TYPES: frozenset[type] = frozenset({bytes, bytearray, memoryview})
#: A list whose first leaf has one of these types contains no arrays.
_PLAIN: frozenset[type] = frozenset({int, float, str, bool, type(None), dict})


class Raw(NamedTuple):
    """An array's bytes, with their dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


class Placed(NamedTuple):
    """An array, and the keys that lead to its place in the inputs."""

    path: tuple[int | str, ...]
    raw: Raw


def split(inputs: Any, *, many: bool) -> tuple[Any, list[Placed]]:
    """Take the arrays out of inputs. Returns the rest, with a 0 in the place of each array, and the arrays.

    ``many``: these are the inputs of a list job, possibly stacked as one array. A list of arrays of the same
    shape is stacked to one array. Raises InputError when an array cannot be read.
    """
    found: list[Placed] = []
    if many and isinstance(inputs, list | tuple):
        return [_without(value, (i,), found) for i, value in enumerate(inputs)], found
    rest = _without(inputs, (), found)
    if many and not (found and found[0].path == () and found[0].raw.shape):
        raise InputError(f"must be a list or an array of inputs, got {type(inputs).__name__}", "inputs")
    return rest, found


def _without(value: Any, path: tuple[int | str, ...], found: list[Placed]) -> Any:
    if type(value) is dict and "b64" not in value:
        return {name: _leaf(item, (*path, name), found) for name, item in value.items()}
    return _leaf(value, path, found)


def _leaf(value: Any, path: tuple[int | str, ...], found: list[Placed]) -> Any:
    if type(value) in _BYTES_TYPES:
        found.append(Placed(path, Raw(BYTES, (), memoryview(value).cast("B"))))
        return 0
    if type(value) is dict and type(value.get("b64")) in _BYTES_TYPES:  # a file and its name
        return {**value, "b64": _leaf(value["b64"], (*path, "b64"), found)}
    array = _array_of(value)
    if array is None:
        return value
    raw = raw_of(array)
    if raw is None:
        return array.tolist()
    found.append(Placed(path, raw))
    return 0


def _array_of(value: Any) -> Array | None:
    """Return an array, or a list of arrays of one shape, as a numpy array; None for any other value."""
    kind = type(value)
    if kind in _PLAIN:
        return None
    try:
        if kind is list or kind is tuple:
            return _stacked(value)
        if hasattr(value, "detach") and hasattr(value, "cpu"):
            return _from_torch(value)
        if hasattr(value, "__array__") and hasattr(value, "shape") and hasattr(value, "dtype"):
            import numpy as np

            return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as exc:
        raise InputError(
            f"holds a {kind.__name__} that cannot be read as an array: {exc}", "inputs"
        ) from None
    return None


def _stacked(values: Sequence[Any]) -> Array | None:
    """Return a list of arrays stacked; None if it contains anything else, or if the shapes differ."""
    first: Any = values
    while type(first) is list or type(first) is tuple:
        if not first:
            return None
        first = first[0]
    if type(first) in _PLAIN or not hasattr(first, "shape"):
        return None
    arrays = [_array_of(value) for value in values]
    shapes = {None if array is None else array.shape for array in arrays}
    if None in shapes or len(shapes) > 1:
        return None
    import numpy as np

    return np.stack(arrays)  # type: ignore[arg-type]  # none is None


def _from_torch(tensor: Any) -> Array:
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()  # type: ignore[no-any-return]  # torch is not imported here
    except TypeError:  # bfloat16, which numpy lacks; float32 can represent all its numbers
        return tensor.float().numpy()  # type: ignore[no-any-return]


def raw_of(array: Array) -> Raw | None:
    """Return an array's bytes; None unless it holds real numbers (not text, objects, complex numbers)."""
    import numpy as np

    if array.dtype.name not in DTYPES:
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            return None
        array = array.astype(np.float64 if array.dtype.kind == "f" else np.float32)
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    return Raw(array.dtype.name, array.shape, flat.view(np.uint8).data if flat.size else b"")


def inline(rest: Any, arrays: Sequence[Placed], *, many: bool) -> Any:
    """Return inputs for JSON: each array is put back, in base64. Changes ``rest``.

    With ``many``, one stacked array becomes the list of its items.
    """
    for path, raw in arrays:
        if path and path[-1] == "b64":
            rest = _put(rest, path, _base64(raw))
            continue
        rest = _put(rest, path, encoded(raw) if path or not many else [encoded(one) for one in _items(raw)])
    return rest


def _base64(raw: Raw) -> str:
    return binascii.b2a_base64(raw.data, newline=False).decode("ascii")


def encoded(raw: Raw) -> dict[str, Any]:
    """Return an array, or bytes, for JSON."""
    text = _base64(raw)
    if raw.dtype == BYTES:
        return {"b64": text}
    return {"b64": text, "dtype": raw.dtype, "shape": raw.shape}


def _items(raw: Raw) -> list[Raw]:
    """Return the items of a stacked array."""
    count, *shape = raw.shape
    size = len(raw.data) // count if count else 0
    return [Raw(raw.dtype, tuple(shape), raw.data[i * size : (i + 1) * size]) for i in range(count)]


def pack(inputs: bytes, arrays: Sequence[Placed]) -> bytes:
    """Return a body to store beside the list. ``inputs`` is JSON, without the arrays."""
    table = orjson.dumps([(path, raw.dtype, _shape(raw)) for path, raw in arrays])
    head = b'{"inputs":%b,"arrays":%b}' % (inputs, table)
    head += b" " * (-(4 + len(head)) % _ALIGNED)
    parts: list[bytes | memoryview] = [len(head).to_bytes(4, "little"), head]
    for _, raw in arrays:
        parts += (raw.data, bytes(-len(raw.data) % _ALIGNED))
    return b"".join(parts)


def _shape(raw: Raw) -> tuple[int, ...]:
    return (len(raw.data),) if raw.dtype == BYTES else raw.shape


def unpack(body: bytes, loads: Callable[[bytes], Any], *, many: bool) -> Any:
    """Return the inputs in a body made by ``pack``. Arrays and bytes are read-only views of it.

    With ``many``, one stacked array becomes the list of its items.

    Raises ValueError, TypeError or LookupError for a body that ``pack`` did not make.
    """
    at = 4 + int.from_bytes(body[:4], "little")
    head = loads(body[4:at])
    inputs, arrays = head["inputs"], head["arrays"]
    if not arrays:
        return inputs
    for path, dtype, shape in arrays:
        if dtype == BYTES:
            (length,) = shape
            if not 0 <= length <= len(body) - at:
                raise ValueError("invalid length of bytes")
            inputs = _put(inputs, path, memoryview(body)[at : at + length])
            at += -(-length // _ALIGNED) * _ALIGNED
            continue
        if dtype not in DTYPES or min(shape, default=0) < 0:
            raise ValueError("invalid dtype or shape")
        import numpy as np

        array = np.frombuffer(body, np.dtype(dtype).newbyteorder("<"), prod(shape), at).reshape(shape)
        at += -(-array.nbytes // _ALIGNED) * _ALIGNED
        inputs = _put(inputs, path, array)
    return [inputs[i, ...] for i in range(len(inputs))] if many and hasattr(inputs, "shape") else inputs


def _put(inputs: Any, path: Sequence[int | str], value: Any) -> Any:
    """Return inputs with ``value`` at ``path``."""
    if not path:
        return value
    *way, last = path
    place = inputs
    for key in way:
        place = place[key]
    place[last] = value
    return inputs
