# SPDX-License-Identifier: Apache-2.0
"""Writes the answer to infer: JSON, followed by the bytes of outputs requested as binary."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import orjson

from gpuinfer.api.oip.requests import Array, Tensor
from gpuinfer.errors import InferenceError

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


def write(
    head: dict[str, Any], tensors: Sequence[Tensor], binary: Collection[str]
) -> tuple[bytes, int | None]:
    """Return an answer's body, and the size of the JSON at its beginning; None: it is all JSON.

    ``binary``: names of the outputs to send as bytes. Raises InferenceError for bytes that are not text and
    not requested as binary.
    """
    entries: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    for one in tensors:
        entry: dict[str, Any] = {"name": one.name, "datatype": one.datatype, "shape": one.shape}
        if one.name in binary:
            data = _as_bytes(one.data)
            entry["parameters"] = {"binary_data_size": len(data)}
            parts.append(data)
        else:
            entry["data"] = _as_list(one)
        entries.append(entry)
    text = orjson.dumps(head | {"outputs": entries}, option=_OPTIONS)
    return (b"".join((text, *parts)), len(text)) if parts else (text, None)


def _as_bytes(data: Array | list[bytes]) -> bytes | memoryview:
    """Return an output's bytes, without a copy if possible."""
    if isinstance(data, list):
        return b"".join(part for one in data for part in (len(one).to_bytes(4, "little"), one))
    flat = np.ascontiguousarray(data, data.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data if flat.size else b""


def _as_list(tensor: Tensor) -> Any:
    """Return the elements row by row; NaN and infinity become null."""
    data = tensor.data
    if not isinstance(data, list):
        flat = data.reshape(-1)
        return flat.tolist() if data.dtype.name == "float16" or not data.dtype.isnative else flat
    try:
        return [one.decode() for one in data]
    except UnicodeDecodeError:
        raise InferenceError(
            f"output {tensor.name[:80]} holds bytes that are not text: request it with binary_data"
        ) from None
