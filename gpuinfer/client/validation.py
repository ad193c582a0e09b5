# SPDX-License-Identifier: Apache-2.0
"""Checks a request against the model's signature before it is queued.

The check is cheap: shape and dtype of an array, the first elements of nested lists, JSON up to ``MAX_VALUES``
values. The worker checks everything again. This module imports neither numpy nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpuinfer.client.inputs import from_bytes, from_raw
from gpuinfer.errors import DtypeMismatch, InputError, MissingInput, ShapeMismatch
from gpuinfer.models.files import bytes_of, is_file, name_of
from gpuinfer.models.json_schema import Check, checker
from gpuinfer.models.signature import Input, Signature
from gpuinfer.models.specs import shape_fits
from gpuinfer.models.type_words import WORDS, word

#: JSON with more values is validated by the worker only.
MAX_VALUES = 2000
_ENCODED = frozenset({"b64", "dtype", "shape"})
#: Kind of the model's dtype -> kinds of array dtype that the worker converts to it.
_KINDS = {"bool": ("bool",), "int": ("int",), "float": ("int", "float")}
#: Kind of the model's dtype -> types of list elements that the worker converts to it.
_IN_LISTS: dict[str, frozenset[type]] = {
    "bool": frozenset({bool}),
    "int": frozenset({int}),
    "float": frozenset({int, float}),
}


class Validator:
    """Checks inputs for one model."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._only = None if signature.named else signature.only
        self._schemas = {
            one.name: _by_schema(one.schema) for one in signature.inputs if one.schema is not None
        }
        #: Name -> kind of its inputs.
        self.kinds: Mapping[str, str] = {one.name: one.kind for one in signature.inputs}
        self._inputs = {one.name: one for one in signature.inputs}

    def unwrapped(self, inputs: Any) -> Any:
        """Return inputs in the form that the model takes, from the form of a multipart request or of -F.

        A single input may be given under its name, or a file under any name. Files of text, JSON, .npy or raw
        array bytes (if dtype and shape are known) are replaced by their content. Raises InputError if a file
        cannot be read as such.
        """
        if type(inputs) is not dict and type(inputs) not in _BYTES:  # fast path: lists and arrays
            return inputs
        if self._only is None:
            if type(inputs) is not dict or is_file(inputs):
                return inputs
            held = {name: _content(value, self._inputs.get(name)) for name, value in inputs.items()}
            return held if any(held[name] is not value for name, value in inputs.items()) else inputs
        if type(inputs) is dict and len(inputs) == 1 and not is_file(inputs):
            ((name, value),) = inputs.items()
            if is_file(value) or (name == self._only.name and self._only.kind != "json"):
                inputs = value
        return _content(inputs, self._only)

    def check(self, inputs: Any, *, many: bool = False) -> None:
        """Raises InputError naming the field that the model does not accept.

        The items of a job (``many``) in a list are left to the worker, as each may fail alone; an array of
        items is checked.
        """
        if many:
            if self._only is not None and self._only.kind == "tensor" and _shape_of(inputs):
                self._tensor(inputs, self._only, "inputs", first=1)
            return
        if self._only is not None:
            self._one(inputs, self._only, "inputs")
        elif self._signature.inputs:
            self._named(inputs)

    def _named(self, inputs: Any) -> None:
        names = list(self.kinds)
        wanted = f"the model's inputs are {', '.join(names)}"
        if not isinstance(inputs, Mapping) or is_file(inputs):
            raise InputError(f"must map names to values: {wanted}; got {word(inputs)}", "inputs")
        unknown = sum(key not in self.kinds for key in inputs)
        if unknown:
            raise InputError(f"has {unknown} unknown name{'s' * (unknown > 1)}; {wanted}", "inputs")
        for one in self._signature.inputs:
            if one.name not in inputs:
                raise MissingInput(f"is missing; {wanted}", f"inputs.{one.name}")
            self._one(inputs[one.name], one, f"inputs.{one.name}")

    def _one(self, value: Any, wanted: Input, field: str) -> None:
        if wanted.kind == "tensor":
            self._tensor(value, wanted, field)
        elif wanted.kind in ("json", "text"):
            if wanted.kind == "text" and not isinstance(value, str):
                raise InputError(f"must be a string, got {word(value)}", field)
            check = self._schemas.get(wanted.name)
            if check is not None and _few_values(value):
                with suppress(ValueError):  # contains arrays, which become lists only when packed
                    check(value, field)
        elif not is_file(value) and not _is_array(value):
            raise InputError(
                f'must be {_FILES[wanted.kind]}: its bytes, or {{"b64": "..."}}; got {word(value)}', field
            )

    def _tensor(self, value: Any, wanted: Input, field: str, *, first: int = 0) -> None:
        """Check shape and dtype, ignoring the ``first`` dimensions, which count the items of a job."""
        if type(value) is not list and is_file(value):
            if wanted.file is None:
                raise InputError("must be numbers or an array, got a file", field)
            return
        shape, found = _shape_and_dtype(value, field)
        shape = None if shape is None else shape[first:]
        if shape is not None and wanted.shape is not None and not shape_fits(shape, wanted.shape):
            free = " (-1: any length)" if -1 in wanted.shape else ""
            raise ShapeMismatch(
                f"has shape {list(shape)[:16]}, the model wants {list(wanted.shape)}{free}"
                if shape or _json_type(value) is None
                else f"is {word(value)}, the model wants shape {list(wanted.shape)}{free}",
                field,
            )
        if wanted.dtype is None or found is None:
            return
        kind = _kind_of(wanted.dtype)
        if isinstance(found, str):
            if _kind_of(found) not in (*_KINDS.get(kind, ()), ""):
                raise DtypeMismatch(f"is {found}, the model wants {wanted.dtype}", field)
        elif found not in _IN_LISTS.get(kind, {found}) and not (
            found is type(None) and kind == "float" and wanted.allow_nan
        ):
            raise DtypeMismatch(
                f"holds {WORDS.get(found, found.__name__)}, the model wants {wanted.dtype}", field
            )


_BYTES: frozenset[type] = frozenset({bytes, bytearray, memoryview})
#: First bytes of a .npy file, and the same in base64.
_NPY, _NPY_BASE64 = b"\x93NUMPY", "k05VTVBZ"
#: Suffixes of files that may hold raw array bytes.
_RAW = frozenset({"", ".bin", ".raw"})
_FILES = {"bytes": "bytes", "image": "an image file", "audio": "a sound file", "file": "a file"}


def _content(value: Any, wanted: Input | None) -> Any:
    """Return the content of a file if the model's input is not a file; return other values unchanged."""
    if wanted is None or not is_file(value):
        return value
    if wanted.kind not in ("text", "json", "tensor"):
        return value
    path = Path(name_of(value))
    if wanted.kind != "tensor":
        return from_bytes(_bytes_of(value), path, wanted.kind)
    suffix = path.suffix.lower()
    if suffix == ".npy" or _is_npy(value):
        return from_bytes(_bytes_of(value), path.with_suffix(".npy") if suffix else Path("x.npy"))
    if wanted.file is not None:
        return value
    if suffix == ".json":
        return from_bytes(_bytes_of(value), path)
    if wanted.dtype is None or wanted.shape is None or suffix not in _RAW:
        return value
    return from_raw(_bytes_of(value), wanted.dtype, wanted.shape)


def _bytes_of(value: Any) -> bytes:
    return bytes(bytes_of(value, "inputs"))


def _is_npy(value: Any) -> bool:
    """Whether bytes or base64 begin like a .npy file."""
    content = value["b64"] if isinstance(value, Mapping) else value
    if isinstance(content, str):
        return content.startswith(_NPY_BASE64)
    return bytes(memoryview(content)[: len(_NPY)]) == _NPY


def _shape_and_dtype(value: Any, field: str) -> tuple[tuple[int, ...] | None, str | type | None]:
    """Return (shape, dtype or type of the first number) of a tensor; None for what cannot be determined."""
    if type(value) is not list and isinstance(value, Mapping):
        if value.keys() != _ENCODED:
            got = ", ".join(map(str, list(value)[:5])) or "none"
            raise InputError(f"an encoded tensor has the keys b64, dtype and shape; got {got[:200]}", field)
        shape, dtype = value["shape"], value["dtype"]
        right = isinstance(shape, list | tuple) and {int}.issuperset(map(type, shape[:64]))
        return tuple(shape) if right else None, dtype if isinstance(dtype, str) else None
    dims: list[int] = []
    while type(value) is list or type(value) is tuple:
        dims.append(len(value))
        if not value or len(dims) > 64:
            return tuple(dims), None
        value = value[0]
    if _is_array(value):
        rest = _shape_of(value)
        return (*dims, *rest), str(value.dtype).rpartition(".")[2]
    return tuple(dims), type(value)


def _is_array(value: Any) -> bool:
    return (hasattr(value, "shape") and hasattr(value, "dtype")) or (
        type(value) is dict and value.keys() == _ENCODED
    )


def _shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of an array; empty for any other value."""
    return tuple(int(length) for length in value.shape) if hasattr(value, "shape") else ()


def _json_type(value: Any) -> type | None:
    return type(value) if type(value) in WORDS else None


def _kind_of(dtype: str) -> str:
    """Return bool, int or float for a dtype; empty for a dtype that only the worker knows."""
    name = dtype.removeprefix("u").removeprefix("b") if dtype != "bool" else dtype
    return next((kind for kind in ("bool", "int", "float") if name.startswith(kind)), "")


def _few_values(value: Any) -> bool:
    """Whether JSON has at most ``MAX_VALUES`` values; stops counting there."""
    left, stack = MAX_VALUES, [value]
    while stack:
        one = stack.pop()
        if isinstance(one, list | tuple | dict):
            left -= len(one)
            if left < 0:
                return False
            stack.extend(one.values() if isinstance(one, dict) else one)
    return True


def _by_schema(schema: Mapping[str, Any]) -> Check | None:
    """Return a JSON schema validator; None if only the worker can validate."""
    try:
        return checker(schema)
    except (ImportError, ValueError):  # the extra "schema" is not installed, or the schema is not supported
        return None
