# SPDX-License-Identifier: Apache-2.0
"""Converts inputs from JSON to arrays, and arrays back to JSON.

A value is a nested list (or a bare number for shape ``()``), or raw little-endian bytes in C order as
``{"b64": "...", "dtype": "float32", "shape": [1, 8, 8]}``, or, from gpuinfer's code, a numpy array. Bytes and
arrays may have another dtype than the manifest's, if each number is in the range of that. If the manifest has
an ``image`` or ``audio`` table, the bytes of such a file may be sent in place of the tensor.

Lists are not checked by numpy, which would accept ``"1.5"``, ``true`` and ``null`` as numbers. Instead they
are flattened level by level; the set of lengths at each level and the set of types at the bottom must be
right. This runs in C for a whole batch at once. Only if something is wrong are the items checked one by one,
to find out what and where.

numpy has no bfloat16: such an array has the 16 bits of each value as uint16.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any, Literal, NoReturn

import numpy as np

from gpuinfer.errors import DtypeMismatch, InputError, MissingInput, NonFiniteInput, ShapeMismatch
from gpuinfer.models.files import bytes_of, is_file
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.specs import DTYPES, InputSpec, shape_fits
from gpuinfer.models.type_words import WORDS, word

Array = np.ndarray[Any, np.dtype[Any]]
#: One array per input of the manifest, in its order.
Item = tuple[Array, ...]
#: How arrays are returned. raw: like b64, and scores of a classification as the model returns them; binary:
#: like raw, but they stay arrays, to be sent as bytes.
Encoding = Literal["list", "b64", "raw", "binary"]

_BFLOAT16 = "bfloat16"
#: Kind of a dtype -> the types of JSON values and the kinds of numpy arrays that are accepted for it.
_ALLOWED: dict[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "b"),
    "i": (frozenset({int}), "iu"),
    "u": (frozenset({int}), "iu"),
    "f": (frozenset({int, float}), "iuf"),
}
#: The dtypes that encoded tensors may have: the manifest's, and other ones of callers' arrays.
_BYTES_OF = frozenset((*DTYPES, "uint16", "uint32", "uint64"))
_ENCODED_KEYS = frozenset({"b64", "dtype", "shape"})
#: Maximum number of dimensions of a shape in an error.
_SHOWN_DIMENSIONS = 16
_PLAIN_TYPES = frozenset({list, int, float, bool})


def decode_batch(manifest: Manifest, inputs: Sequence[object]) -> list[Item | InputError]:
    """Turn one ``inputs`` value per request into arrays.

    A value is for the model's only input, or a mapping of input names to values. An invalid one gives an
    InputError in its place, with field ``inputs`` or ``inputs.<name>``; the others are not affected. Arrays
    may share memory within the batch, and may be read-only.
    """
    if inputs and len(manifest.inputs) == 1 and _PLAIN_TYPES.issuperset(map(type, inputs)):
        spec = manifest.inputs[0]
        try:
            batch = _from_lists(inputs, spec, "inputs")
        except InputError:
            pass  # at least one item is invalid; each is checked below
        else:
            return (
                [(item,) for item in batch] if spec.shape else [(batch[i, ...],) for i in range(len(batch))]
            )
    return [_item_or_error(manifest, value) for value in inputs]


def decode(manifest: Manifest, value: object) -> Item:
    """Turn one ``inputs`` value into arrays. Raises the InputError that ``decode_batch`` would return."""
    named = _by_name(manifest, value)
    if named is None:
        return (decode_value(value, manifest.inputs[0], "inputs"),)
    return tuple(decode_value(named[spec.name], spec, f"inputs.{spec.name}") for spec in manifest.inputs)


def encode_array(array: Array, encoding: Encoding = "list") -> object:
    """Turn an output into JSON: nested lists, in which NaN and infinity become null, or the exact bytes."""
    if encoding == "binary":
        return np.array(array, array.dtype.newbyteorder("<"), order="C")  # a copy, as the memory is reused
    if encoding != "list":
        raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        text = binascii.b2a_base64(raw, newline=False).decode("ascii")
        return {"b64": text, "dtype": array.dtype.name, "shape": list(array.shape)}
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        boxed = array.astype(object)
        boxed[~np.isfinite(array)] = None
        return boxed.tolist()
    return array.tolist()


def _item_or_error(manifest: Manifest, value: object) -> Item | InputError:
    try:
        return decode(manifest, value)
    except InputError as exc:
        return exc


def _by_name(manifest: Manifest, value: object) -> Mapping[str, object] | None:
    """Return the mapping of all input names to values; None if ``value`` is that of the only input."""
    names = [spec.name for spec in manifest.inputs]
    wanted = f"the model's inputs are {', '.join(names)}"
    if not isinstance(value, Mapping) or "b64" in value:
        if len(names) == 1:
            return None
        raise InputError(f"must map names to values: {wanted}; got {word(value)}", "inputs")
    unknown = sum(key not in names for key in value)
    if unknown:
        raise InputError(f"has {unknown} unknown name{'s' * (unknown > 1)}; {wanted}", "inputs")
    for name in names:
        if name not in value:
            raise MissingInput(f"is missing; {wanted}", f"inputs.{name}")
    return value


def decode_value(value: object, spec: InputSpec, field: str) -> Array:
    """Turn the value of one input into an array; ``field`` names it in the InputError that is raised."""
    if isinstance(value, np.ndarray):
        return _from_array(value, spec, field)
    if is_file(value):
        return _from_array(_from_file(value, spec, field), spec, field)
    if isinstance(value, Mapping):
        return _from_bytes(value, spec, field)
    item: Array = _from_lists([value], spec, field)[0, ...]
    return item


def _from_file(value: object, spec: InputSpec, field: str) -> Array:
    """Turn a file into the tensor that the manifest's ``image`` or ``audio`` table describes."""
    if spec.image is not None:
        from gpuinfer.models.images import image_to_array

        return image_to_array(bytes_of(value, field), spec, field)
    if spec.audio is not None:
        from gpuinfer.models.sounds import wav_to_array

        samples = wav_to_array(bytes_of(value, field), spec.audio, field)
        return samples[0] if len(spec.shape) == 1 else samples
    raise InputError(
        "must be numbers, got a file: the model's manifest has no image or audio table for this input", field
    )


# -- nested lists ---------------------------------------------------------------------------


def _from_lists(values: Sequence[object], spec: InputSpec, field: str) -> Array:
    """Stack nested lists into one array of shape (len(values), *item). Raises InputError for invalid ones."""
    level: Sequence[Any] = values
    lengths: list[int] = []
    for wanted in spec.shape:
        if set(map(type, level)) != {list}:
            _refuse_shape(values[0], spec, field)
        found = set(map(len, level))
        if len(found) != 1:
            raise ShapeMismatch(f"lists differ in length at depth {len(lengths)}: {_wants(spec)}", field)
        lengths.append(found.pop())
        if not shape_fits((lengths[-1],), (wanted,)):
            _refuse_shape(values[0], spec, field)
        level = list(chain.from_iterable(level))
    strange = set(map(type, level)) - _ALLOWED[_kind(spec)][0]
    if type(None) in strange and spec.allow_nan and _kind(spec) == "f":
        level = [math.nan if number is None else number for number in level]
        strange.discard(type(None))
    if strange:
        _refuse_types(values[0], strange, spec, field)
    return _from_numbers(level, spec, field).reshape(len(values), *lengths)


def _from_numbers(numbers: Sequence[Any], spec: InputSpec, field: str) -> Array:
    dtype: np.dtype[Any] = np.dtype(np.float32 if spec.dtype == _BFLOAT16 else spec.dtype)
    try:
        with np.errstate(over="ignore"):
            array = np.fromiter(numbers, dtype, len(numbers))
    except OverflowError:
        raise DtypeMismatch(f"holds a number outside the range of {spec.dtype}", field) from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        _check_finite(np.fromiter(numbers, np.float64, len(numbers)), array, spec, field)
    return _to_bfloat16(array, spec, field) if spec.dtype == _BFLOAT16 else array


def _check_finite(wide: Array, narrow: Array, spec: InputSpec, field: str) -> None:
    """Refuse NaN and infinity unless the manifest allows them, and finite numbers that became infinite."""
    finite = np.isfinite(wide)
    if (finite & ~np.isfinite(narrow)).any():
        raise DtypeMismatch(f"holds a number outside the range of {spec.dtype}", field)
    if not spec.allow_nan and not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        raise NonFiniteInput(
            f"holds {wide.flat[at]} at position {at}; the model takes finite numbers only", field
        )


# -- bytes and arrays -----------------------------------------------------------------------


def _from_bytes(value: Mapping[Any, object], spec: InputSpec, field: str) -> Array:
    """Decode ``{"b64", "dtype", "shape"}``; the result is read-only."""
    if value.keys() != _ENCODED_KEYS:
        raise InputError(f"an encoded tensor has the keys b64, dtype and shape; {_keys_of(value)}", field)
    name = value["dtype"]
    if not isinstance(name, str) or name not in _BYTES_OF or _kind_of(name) not in _ALLOWED[_kind(spec)][1]:
        raise DtypeMismatch(f"is {_dtype_word(name)}, the manifest wants {spec.dtype}", field)
    shape = _encoded_shape(value["shape"], spec, field)
    raw = _base64(value["b64"], field)
    dtype = np.dtype(np.uint16 if name == _BFLOAT16 else name)
    needed = prod(shape) * dtype.itemsize
    if len(raw) != needed:
        raise InputError(f"b64 holds {len(raw)} bytes; shape {list(shape)} of {name} takes {needed}", field)
    if dtype.kind == "b" and raw.strip(b"\0\1"):
        raise DtypeMismatch("each bool must be a byte 0 or 1", field)
    array = np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
    if name != spec.dtype:
        return _from_array(_from_bfloat16(array) if name == _BFLOAT16 else array, spec, field)
    if _kind(spec) == "f" and not spec.allow_nan:
        wide = _from_bfloat16(array) if spec.dtype == _BFLOAT16 else array
        if not np.isfinite(wide).all():
            _check_finite(wide, wide, spec, field)
    return array


def _encoded_shape(shape: object, spec: InputSpec, field: str) -> tuple[int, ...]:
    if not isinstance(shape, list) or not {int}.issuperset(map(type, shape)):
        raise InputError(f"shape must be a list of whole numbers, got {word(shape)}", field)
    if not shape_fits(tuple(shape), spec.shape):
        raise ShapeMismatch(f"has shape {_shown(shape)}, {_wants(spec)}", field)
    return tuple(shape)


def _base64(text: object, field: str) -> bytes:
    if not isinstance(text, str):
        raise InputError(f"b64 must be a string, got {word(text)}", field)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as exc:
        raise InputError(f"b64 is not valid base64: {exc}", field) from None


def _from_array(array: Array, spec: InputSpec, field: str) -> Array:
    """Convert an array to the manifest's dtype. Raises InputError if a number does not fit it."""
    if not shape_fits(array.shape, spec.shape):
        raise ShapeMismatch(f"has shape {list(array.shape)}, {_wants(spec)}", field)
    if array.dtype.kind not in _ALLOWED[_kind(spec)][1]:
        raise DtypeMismatch(f"is {array.dtype.name}, the manifest wants {spec.dtype}", field)
    dtype: np.dtype[Any] = np.dtype(np.float32 if spec.dtype == _BFLOAT16 else spec.dtype)
    if dtype.kind in "iu" and array.size:
        info = np.iinfo(dtype)
        if int(array.min()) < info.min or int(array.max()) > info.max:
            raise DtypeMismatch(f"holds a number outside the range of {spec.dtype}", field)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype, copy=False)
    if dtype.kind == "f" and not np.isfinite(narrow).all():
        _check_finite(array, narrow, spec, field)
    return _to_bfloat16(narrow, spec, field) if spec.dtype == _BFLOAT16 else narrow


def _to_bfloat16(array: Array, spec: InputSpec, field: str) -> Array:
    """Round float32 to the nearest bfloat16, ties to even, and return its bits."""
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    _check_finite(array, _from_bfloat16(rounded), spec, field)
    return rounded


def _from_bfloat16(bits: Array) -> Array:
    """Convert the bits of bfloat16 to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# -- words for errors -----------------------------------------------------------------------
# As errors are logged, they contain kinds, counts and shapes of what was sent, but never a name or a value.


def _kind(spec: InputSpec) -> str:
    return _kind_of(spec.dtype)


def _kind_of(dtype: str) -> str:
    return "f" if dtype == _BFLOAT16 else np.dtype(dtype).kind


def _wants(spec: InputSpec) -> str:
    return f"the manifest wants {list(spec.shape)}" + ("" if spec.fixed else " (-1: any length)")


def _keys_of(value: Mapping[Any, object]) -> str:
    lacking = sorted(_ENCODED_KEYS - value.keys())
    others = len(value.keys() - _ENCODED_KEYS)
    return f"this one lacks {', '.join(lacking) or 'none'} and has {others} others"


def _dtype_word(dtype: object) -> str:
    known = isinstance(dtype, str) and dtype in _BYTES_OF
    return str(dtype) if known else f"{word(dtype)} that is not a dtype"


def _shown(shape: list[int]) -> list[int | str]:
    """Return a shape's first lengths, without those that are not valid: they might be the caller's data."""
    return [length if 0 <= length < 2**31 else "…" for length in shape[:_SHOWN_DIMENSIONS]]


def _shape_of(value: object) -> list[int]:
    """Return the shape of nested lists, judged by their first elements."""
    shape: list[int] = []
    while isinstance(value, list) and len(shape) < _SHOWN_DIMENSIONS:
        shape.append(len(value))
        value = value[0] if value else None
    return shape


def _refuse_shape(value: object, spec: InputSpec, field: str) -> NoReturn:
    got = f"has shape {_shape_of(value)}" if isinstance(value, list) else f"is {word(value)}"
    raise ShapeMismatch(f"{got}, {_wants(spec)}", field)


def _refuse_types(value: object, strange: set[type], spec: InputSpec, field: str) -> NoReturn:
    if list in strange:
        _refuse_shape(value, spec, field)
    words = " and ".join(sorted(WORDS.get(kind, f"a {kind.__name__}") for kind in strange))
    raise DtypeMismatch(f"holds {words} where the manifest wants {spec.dtype}", field)
