# SPDX-License-Identifier: Apache-2.0
"""Parses a request to infer: JSON, followed by bytes.

With the header ``Inference-Header-Content-Length`` that many bytes are JSON. Then follow, in the order of the
inputs, the bytes of those with a parameter ``binary_data_size``: little-endian, in C order; each element of
BYTES after its length in 4 bytes. Arrays are read-only views of the body.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np

from gpuinfer.api.admission import parse_json
from gpuinfer.errors import DtypeMismatch, InputError, MalformedJson, ShapeMismatch
from gpuinfer.models.type_words import WORDS, word

Array = np.ndarray[Any, np.dtype[Any]]
#: Datatype -> numpy's name. BF16 is read only from bytes, and BYTES is not an array.
DTYPES = {
    "BOOL": "bool",
    **{f"{sign.upper()}INT{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
BYTES, BF16 = "BYTES", "BF16"
#: Kind of a dtype -> JSON types accepted for it. null is NaN.
_MAY_BE: dict[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "f": frozenset({int, float, type(None)}),
}
_MOST_DIMENSIONS, _MOST_TENSORS = 32, 256
#: Maximum elements of a shape. Dimensions of 0 count as 1, because numpy multiplies the others.
_MOST_ELEMENTS = 2**48


class Tensor(NamedTuple):
    """A tensor of a request or an answer."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    #: For BYTES, a list of its elements in row-major order.
    data: Array | list[bytes]


class Wanted(NamedTuple):
    """A requested output."""

    name: str
    binary: bool
    #: Number of best classes to return instead of scores; 0: return scores.
    classes: int = 0


class InferRequest(NamedTuple):
    """A parsed request."""

    id: str
    parameters: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    #: None: all outputs.
    outputs: tuple[Wanted, ...] | None
    #: Whether outputs are sent as bytes by default.
    binary: bool


def read(body: bytes, json_length: str) -> InferRequest:
    """Parse a request. ``json_length``: the header's value; empty: the whole body is JSON.

    Raises MalformedJson, InputError, ShapeMismatch, DtypeMismatch, each naming the field.
    """
    length = _length(json_length, len(body))
    found = parse_json(body[:length])
    if not isinstance(found, dict):
        raise MalformedJson(f"must be a JSON object with inputs, got {word(found)}", "body")
    request_id, parameters = found.get("id", ""), _object(found, "parameters", "parameters")
    if not isinstance(request_id, str):
        raise InputError(f"must be a string, got {word(request_id)}", "id")
    binary = _true_or_false(parameters, "binary_data_output", "parameters", default=False)
    outputs = found.get("outputs")
    return InferRequest(
        id=request_id,
        parameters=parameters,
        inputs=_inputs(_entries(found.get("inputs"), "inputs"), memoryview(body)[length:]),
        outputs=_outputs(_entries(outputs, "outputs"), binary=binary) if outputs else None,
        binary=binary,
    )


def _length(text: str, size: int) -> int:
    if not text:
        return size
    if not text.isdecimal() or len(text) > 18 or not 0 < int(text) <= size:
        raise InputError(
            f"must be the number of bytes of JSON that the body begins with, 1 to {size}, got {text[:40]!r}",
            "Inference-Header-Content-Length",
        )
    return int(text)


def _entries(found: object, field: str) -> list[dict[str, Any]]:
    """Return the entries of ``inputs`` or ``outputs``: objects with unique names."""
    if not isinstance(found, list) or not found:
        raise InputError(f"must be a list of tensors, got {word(found)}", field)
    if len(found) > _MOST_TENSORS:
        raise InputError(f"has more than {_MOST_TENSORS} tensors", field)
    for place, one in enumerate(found):
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise InputError("must be an object with a name", f"{field}[{place}]")
    names = [one["name"] for one in found]
    if len(set(names)) < len(names):
        raise InputError("must have unique names", field)
    return found


def _object(holder: Mapping[str, Any], name: str, field: str) -> Mapping[str, Any]:
    found = holder.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"must be an object, got {word(found)}", field)
    return found


def _true_or_false(parameters: Mapping[str, Any], name: str, field: str, *, default: bool) -> bool:
    found = parameters.get(name, default)
    if not isinstance(found, bool):
        raise InputError(f"must be true or false, got {word(found)}", f"{field}.{name}")
    return found


def _outputs(entries: list[dict[str, Any]], *, binary: bool) -> tuple[Wanted, ...]:
    found = []
    for one in entries:
        field = f"outputs.{one['name'][:80]}.parameters"
        parameters = _object(one, "parameters", field)
        _no_shared_memory(parameters, field)
        classes = parameters.get("classification", 0)
        if type(classes) is not int or not 0 <= classes < 2**31:
            raise InputError("must be a number of classes", f"{field}.classification")
        as_bytes = _true_or_false(parameters, "binary_data", field, default=binary)
        found.append(Wanted(one["name"], as_bytes, classes))
    return tuple(found)


def _no_shared_memory(parameters: Mapping[str, Any], field: str) -> None:
    if "shared_memory_region" in parameters:
        raise InputError("shared memory is not supported: send the data", f"{field}.shared_memory_region")


def _inputs(entries: list[dict[str, Any]], rest: memoryview) -> tuple[Tensor, ...]:
    found, at = [], 0
    for one in entries:
        field = f"inputs.{one['name'][:80]}"
        datatype, shape = _datatype(one.get("datatype"), field), _shape(one.get("shape"), field)
        parameters = _object(one, "parameters", f"{field}.parameters")
        _no_shared_memory(parameters, f"{field}.parameters")
        size = parameters.get("binary_data_size")
        if size is None:
            data = _from_json(one, datatype, shape, field)
        elif "data" in one:
            raise InputError("has both data and binary_data_size; send one of them", field)
        elif type(size) is not int or not 0 <= size <= len(rest) - at:
            raise InputError(
                f"must be a number of bytes; {len(rest) - at} are left after the JSON",
                f"{field}.parameters.binary_data_size",
            )
        else:
            data = _from_bytes(rest[at : at + size], datatype, shape, field)
            at += size
        found.append(Tensor(one["name"], datatype, shape, data))
    if at < len(rest):
        raise InputError(f"{len(rest) - at} bytes after the JSON belong to no input", "body")
    return tuple(found)


def _datatype(found: object, field: str) -> str:
    if not isinstance(found, str) or (found not in DTYPES and found not in (BYTES, BF16)):
        raise DtypeMismatch(f"must be one of {', '.join(DTYPES)}, BF16, BYTES", f"{field}.datatype")
    return found


def _shape(found: object, field: str) -> tuple[int, ...]:
    right = isinstance(found, list) and len(found) <= _MOST_DIMENSIONS
    if not right or not all(type(length) is int and 0 <= length < 2**31 for length in found):  # type: ignore[attr-defined]
        raise ShapeMismatch(f"must be a list of at most {_MOST_DIMENSIONS} lengths", f"{field}.shape")
    if prod(length or 1 for length in found) > _MOST_ELEMENTS:  # type: ignore[attr-defined]
        raise ShapeMismatch(f"has more than {_MOST_ELEMENTS} elements", f"{field}.shape")
    return tuple(found)  # type: ignore[arg-type]  # it is a list


# -- from bytes -----------------------------------------------------------------------------


def _from_bytes(data: memoryview, datatype: str, shape: tuple[int, ...], field: str) -> Array | list[bytes]:
    if datatype == BYTES:
        return _elements(data, prod(shape), field)
    stored = np.dtype("uint16" if datatype == BF16 else DTYPES[datatype]).newbyteorder("<")
    needed = prod(shape) * stored.itemsize
    if len(data) != needed:
        raise ShapeMismatch(f"has {len(data)} bytes; shape {list(shape)} of {datatype} takes {needed}", field)
    array = np.frombuffer(data, stored).reshape(shape)
    if datatype == BF16:  # numpy lacks it; float32 can represent all its values
        return (array.astype(np.uint32) << 16).view(np.float32)
    if datatype == "BOOL" and data.nbytes and np.frombuffer(data, np.uint8).max() > 1:
        raise DtypeMismatch("each BOOL must be a byte 0 or 1", field)
    return array


def _elements(data: memoryview, count: int, field: str) -> list[bytes]:
    """Return the elements of BYTES."""
    found: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(found) < count:
        length = int.from_bytes(data[at : at + 4], "little")
        at += 4 + length
        if at > len(data):
            break
        found.append(bytes(data[at - length : at]))
    if len(found) != count or at != len(data):
        raise ShapeMismatch(
            f"must hold {count} elements, each after its length in 4 bytes; its {len(data)} bytes do not",
            field,
        )
    return found


# -- from JSON ------------------------------------------------------------------------------


def _from_json(
    entry: Mapping[str, Any], datatype: str, shape: tuple[int, ...], field: str
) -> Array | list[bytes]:
    """Return the elements of a list, flat or nested like the shape."""
    if not isinstance(entry.get("data"), list):
        raise InputError(
            f"must be a list of the tensor's elements, got {word(entry.get('data'))}", f"{field}.data"
        )
    flat = _flat(entry["data"], shape, f"{field}.data")
    types = set(map(type, flat))
    if datatype == BYTES:
        if types - {str}:
            raise DtypeMismatch("in JSON, each element of BYTES must be a string", f"{field}.data")
        return [text.encode("utf-8", "surrogatepass") for text in flat]
    dtype = np.dtype("float32" if datatype == BF16 else DTYPES[datatype])
    if strange := types - _MAY_BE[dtype.kind]:
        words = " and ".join(sorted(WORDS.get(kind, kind.__name__) for kind in strange))
        raise DtypeMismatch(f"holds {words}, its datatype is {datatype}", f"{field}.data")
    if type(None) in types:
        flat = [np.nan if number is None else number for number in flat]
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
    except OverflowError:
        array = None
    if array is None or (
        dtype.kind == "f" and np.isinf(array).any() and np.isfinite(flat)[np.isinf(array)].any()
    ):
        raise DtypeMismatch(f"holds a number outside the range of {datatype}", f"{field}.data")
    return array.reshape(shape)


def _flat(data: list[Any], shape: tuple[int, ...], field: str) -> list[Any]:
    level, depth = data, 0
    while level and set(map(type, level)) == {list} and depth < len(shape):
        if {*map(len, level)} != {shape[depth + 1] if depth + 1 < len(shape) else -1}:
            raise ShapeMismatch(f"must be flat, or nested like its shape {list(shape)}", field)
        level, depth = list(chain.from_iterable(level)), depth + 1
    if len(level) != prod(shape):
        raise ShapeMismatch(f"has {len(level)} elements, its shape {list(shape)} has {prod(shape)}", field)
    return level
