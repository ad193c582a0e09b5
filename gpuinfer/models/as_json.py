# SPDX-License-Identifier: Apache-2.0
"""Write an example of a model's inputs as a request's JSON carries it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: An array of more numbers than this is written in base64.
_AS_LIST = 4096


def as_json(value: Any) -> Any:
    """Return an example as a request's JSON carries it."""
    if isinstance(value, Mapping):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    if isinstance(value, bytes | bytearray):
        return {"b64": base64.b64encode(value).decode()}
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.size <= _AS_LIST else _as_bytes(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return as_json(value.read_bytes())
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if type(value).__module__.startswith("PIL."):
        file = io.BytesIO()
        value.save(file, "PNG")
        return as_json(file.getvalue())
    return value


def _as_bytes(array: np.ndarray[Any, np.dtype[Any]]) -> dict[str, Any]:
    raw = np.ascontiguousarray(array).tobytes()
    return {"b64": base64.b64encode(raw).decode(), "dtype": array.dtype.name, "shape": list(array.shape)}
