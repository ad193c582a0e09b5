# SPDX-License-Identifier: Apache-2.0
"""Converts the output of a Python model to JSON."""

from __future__ import annotations

import binascii
import dataclasses
import datetime
import enum
import io
import math
import pathlib
import sys
import uuid
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from gpuinfer.errors import InferenceError
from gpuinfer.models.tensors import Encoding, encode_array

_PLAIN: frozenset[type] = frozenset({str, int, bool, type(None)})
#: Maximum nesting; deeper structures contain themselves.
_MAX_DEPTH = 64


def to_json(value: Any, encoding: Encoding = "list", depth: int = 0) -> Any:
    """Return a value as JSON: arrays and tensors by ``encoding``, NaN as null, bytes and images as base64, or
    with ``binary`` as they are.

    Also pydantic models, data classes, enumerations, sets, paths (as text), dates. Raises InferenceError
    that names the type of anything else.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if depth > _MAX_DEPTH:
        raise InferenceError(f"its output is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {_key(name): to_json(item, encoding, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple | Set):
        return [to_json(item, encoding, depth + 1) for item in value]
    return _special(value, encoding, depth)


def as_array(value: Any) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return an array or tensor as a numpy array on the host, bfloat16 as float32; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.float() if value.dtype == torch.bfloat16 else value
        array: np.ndarray[Any, np.dtype[Any]] = value.detach().cpu().numpy()
        return array
    return None


def _special(value: Any, encoding: Encoding, depth: int) -> Any:
    array = as_array(value)
    if array is not None:
        if array.dtype.kind not in "biuf":
            raise InferenceError(f"its output is an array of {array.dtype.name}, which JSON cannot represent")
        return encode_array(array, encoding)
    if isinstance(value, np.generic):
        return to_json(value.item(), encoding, depth + 1)
    if isinstance(value, bytes | bytearray | memoryview):
        return {"b64": bytes(value) if encoding == "binary" else _base64(bytes(value))}
    if isinstance(value, enum.Enum):
        return to_json(value.value, encoding, depth + 1)
    if isinstance(value, bool | int | float | str):  # a subclass
        plain = next(one for one in (int, float, str) if isinstance(value, one))
        return to_json(plain(value), encoding, depth + 1)
    if hasattr(value, "model_dump"):
        return to_json(value.model_dump(mode="json"), encoding, depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return to_json(fields, encoding, depth + 1)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, pathlib.PurePath | uuid.UUID):
        return str(value)
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(value, pillow.Image):
        png = _png(value)
        return {"b64": png if encoding == "binary" else _base64(png), "type": "image/png"}
    raise InferenceError(f"its output is of type {type(value).__name__}, which JSON cannot represent")


def _key(name: Any) -> str:
    if isinstance(name, str):
        return str(name)
    if isinstance(name, int | float | np.integer):
        return str(name)
    raise InferenceError(f"its output has a key of type {type(name).__name__}; keys must be strings")


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")
