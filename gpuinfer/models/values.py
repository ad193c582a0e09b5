# SPDX-License-Identifier: Apache-2.0
"""Converts the values of a request into the inputs of a Python model.

=======  ======================================================  ====================================
kind     the request has                                         the model gets
=======  ======================================================  ====================================
tensor   what ``tensors`` accepts                                a numpy array; a torch tensor if annotated
json     any JSON                                                the same, validated by its annotation
text     a string                                                ``str``
bytes    bytes, or ``{"b64": "...", "name": "..."}``             ``bytes``
image    the bytes of an image file, or an array of pixels       ``PIL.Image.Image``, upright
audio    the bytes of a WAV file, or an array of samples         numpy float32, (channels, samples)
file     bytes, or ``{"b64": "...", "name": "..."}``             ``pathlib.Path`` of a temporary file
=======  ======================================================  ====================================
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from gpuinfer.errors import DtypeMismatch, InputError, ManifestError, ShapeMismatch
from gpuinfer.models.files import bytes_of, name_of
from gpuinfer.models.json_schema import checker
from gpuinfer.models.signature import Typed
from gpuinfer.models.sounds import wav_to_array
from gpuinfer.models.specs import FREE, AudioSpec, InputSpec
from gpuinfer.models.tensors import Array, decode_value

#: Takes a request's value and the field to name in an error. Raises InputError.
Reader = Callable[[object, str], Any]
#: Maximum characters of a suffix that a temporary file takes from the request: many libraries need it.
_MAX_SUFFIX = 10


class TemporaryFile:
    """A file that is deleted together with this object."""

    def __init__(self, data: bytes, suffix: str) -> None:
        handle, name = tempfile.mkstemp(prefix="gpuinfer-", suffix=suffix)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        self.path = Path(name)
        weakref.finalize(self, partial(self.path.unlink, missing_ok=True))


def reader_of(typed: Typed, spec: InputSpec | None) -> Reader:
    """Return the reader of one input's values: by its annotation, or by the manifest's ``spec``."""
    kind = typed.input.kind
    if kind == "tensor":
        return _tensor_reader(typed, spec)
    if kind in ("json", "text"):
        return _json_reader(typed, spec)
    if kind == "audio":
        return partial(as_audio, audio=(spec and spec.audio) or AudioSpec.model_validate({}))
    return {"bytes": as_bytes, "image": as_image, "file": as_file}[kind]


def as_bytes(value: object, field: str) -> bytes:
    """Return the bytes of a value."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
        return value.tobytes()
    return bytes(bytes_of(value, field))


def as_image(value: object, field: str) -> Any:
    """Return a PIL image, decoded and upright; also from a uint8 array (height, width[, 3 or 4])."""
    from gpuinfer.models.images import open_image, picture_of

    value = _decoded(value, field)
    if isinstance(value, np.ndarray) and value.ndim > 1:
        if value.dtype != np.uint8:
            raise DtypeMismatch(f"an image's pixels are uint8, these are {value.dtype.name}", field)
        if value.ndim > 3 or (value.ndim == 3 and value.shape[2] not in (3, 4)):
            raise ShapeMismatch(f"an image is (height, width[, 3 or 4]), got {list(value.shape)}", field)
        return picture_of(value)
    return open_image(as_bytes(value, field), field)


def as_audio(value: object, field: str, *, audio: AudioSpec) -> Array:
    """Return float32 samples, (channels, samples), of a WAV file, with the rate and channels of ``audio``.

    An array of a float type is taken as samples already.
    """
    value = _decoded(value, field)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        if value.ndim not in (1, 2):
            raise ShapeMismatch(f"samples are (channels, samples), got {list(value.shape)}", field)
        return np.atleast_2d(value).astype(np.float32, copy=False)
    return wav_to_array(as_bytes(value, field), audio, field)


def _decoded(value: object, field: str) -> object:
    """Decode an array that was sent in base64, as small ones are; return anything else unchanged."""
    return _any_array(value, None, field) if isinstance(value, Mapping) and "dtype" in value else value


def as_file(value: object, field: str) -> TemporaryFile:
    """Write a value's bytes to a temporary file, which is deleted when nothing refers to it any more."""
    suffix = Path(name_of(value)).suffix
    suffix = suffix if len(suffix) <= _MAX_SUFFIX and suffix[1:].isalnum() else ""
    return TemporaryFile(as_bytes(value, field), suffix)


def _json_reader(typed: Typed, spec: InputSpec | None) -> Reader:
    """Validate by the manifest's schema, or by the annotation, with pydantic's rules."""
    if spec is not None and spec.json_schema is not None:
        return _schema_reader(spec.name, spec.json_schema)
    if typed.type is None:
        return _as_text if typed.input.kind == "text" else lambda value, _: value
    if typed.type is str:
        return _as_text
    import pydantic

    adapter = pydantic.TypeAdapter(typed.type)

    def read(value: object, field: str) -> Any:
        try:
            return adapter.validate_json(orjson.dumps(value))
        except pydantic.ValidationError as exc:
            raise _invalid(exc, field) from None
        except (TypeError, ValueError) as exc:
            raise InputError(f"cannot be sent as JSON: {exc}", field) from None

    return read


def _schema_reader(name: str, schema: Mapping[str, Any]) -> Reader:
    try:
        check = checker(schema)
    except ValueError as exc:
        said = str(exc).partition("\n")[0]
        raise ManifestError(f"is not a usable JSON schema: {said}", f"inputs.{name}.schema") from None

    def read(value: object, field: str) -> Any:
        try:
            check(value, field)
        except ValueError as exc:
            raise InputError(f"cannot be sent as JSON: {exc}", field) from None
        return value

    return read


def _invalid(exc: Any, field: str) -> InputError:
    """Return an error that says what a validator found and where. As it is logged, it has no value."""
    errors = exc.errors(include_url=False, include_input=False, include_context=False)
    first = errors[0]
    where = ".".join(str(part) for part in (field, *first["loc"]))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return InputError(f"{first['msg'].removeprefix('Value error, ')}{more}", where)


def _as_text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"must be a string, got {_word(value)}", field)
    return value


def _tensor_reader(typed: Typed, spec: InputSpec | None) -> Reader:
    """Return a reader of arrays: by the manifest, or of any shape if there is only an annotation."""
    if spec is not None:
        return lambda value, field: decode_value(value, spec, field)
    wanted = typed.input.dtype
    origin = getattr(typed.type, "__origin__", typed.type)
    as_torch = getattr(origin, "__module__", "") == "torch"

    def read(value: object, field: str) -> Any:
        array = _any_array(value, wanted, field)
        if not as_torch:
            return array
        import torch

        return torch.from_numpy(array if array.flags.writeable else array.copy())

    return read


def _any_array(value: object, dtype: str | None, field: str) -> Array:
    """Return an array of any shape and of ``dtype``. If that is None, fractions in lists become float32."""
    if not isinstance(value, np.ndarray) and not isinstance(value, Mapping):
        try:
            found = np.asarray(value)
        except ValueError:
            raise ShapeMismatch("lists differ in length", field) from None
        if found.dtype.kind not in "biuf":
            raise DtypeMismatch(f"must be numbers, got {_word(value)}", field)
        return found.astype(dtype or (np.float32 if found.dtype.kind == "f" else found.dtype))
    if isinstance(value, Mapping):
        shape, name = value.get("shape"), value.get("dtype")
        if not isinstance(shape, list) or not isinstance(name, str):
            raise InputError("an encoded tensor has the keys b64, dtype and shape", field)
        free = InputSpec.model_construct(
            name="x", dtype=name, shape=(FREE,) * len(shape), allow_nan=True, kind="tensor"
        )
        array = decode_value(value, free, field)
    else:
        array = value
    if dtype is not None and array.dtype.name != dtype:
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise DtypeMismatch(f"is {array.dtype.name}, the model wants {dtype}", field)
        return array.astype(dtype)
    return array


def _word(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
