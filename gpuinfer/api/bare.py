# SPDX-License-Identifier: Apache-2.0
"""Only the result, in its own content type: image, bytes, text, an array as a .npy file, or JSON.

A Python model's output is under ``output`` in a result, bytes as ``{"b64"}``, an image also with ``"type"``;
the arrays of other models are under ``outputs``.
"""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuinfer.api import accept as accepting
from gpuinfer.api.answers import encode
from gpuinfer.errors import NotAcceptable

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

JSON, TEXT, BYTES, NPY = "application/json", "text/plain", "application/octet-stream", "application/x-npy"
#: Other names for the type of a .npy file.
_NPY_TOO = re.compile(r"application/(?:vnd\.numpy\.)?npy(?![\w.+-])", re.IGNORECASE)
#: Content types that bytes may declare: none that a browser would execute.
_MEDIA = re.compile(r"(?:image|audio|video)/(?!svg)[a-z0-9][a-z0-9.+-]{0,60}")
#: Fields that the worker adds to a model's output.
_ADDED = ("model", "device")
_ARRAY = frozenset({"b64", "dtype", "shape"})


class Bare(NamedTuple):
    """The body of a result, and its content type."""

    content: bytes
    media_type: str


def bare(result: Any, accept: str = "", dtypes: Mapping[str, str] | None = None) -> Bare:
    """Return a result in the type that ``accept`` prefers among those possible; JSON always is.

    ``dtypes``: output name -> dtype of the model, if known, for arrays that the result has as lists. Raises
    NotAcceptable.
    """
    output = output_of(result)
    own, content = _own(output)
    offered = list(dict.fromkeys((own, JSON)))
    accept = _NPY_TOO.sub(NPY, accept)
    array = None
    if NPY in accept.lower():
        array = _array(output, dtypes or {})
        offered += [NPY] if array is not None else []
    wanted = accepting.best(accept, offered)
    if wanted is None:
        why = f"; {_no_array(output)}" if NPY in accept.lower() and array is None else ""
        raise NotAcceptable(
            f"the result is available as {' or '.join(offered)}, not as {accept[:80]!r}{why}",
            "Accept",
        )
    if wanted == NPY and array is not None:
        return Bare(_npy(array), NPY)
    if wanted == JSON or content is None:
        return Bare(encode(result), JSON)
    return Bare(content, f"{TEXT}; charset=utf-8" if wanted == TEXT else wanted)


def output_of(result: Any) -> Any:
    """Return the model's output without the worker's fields; all outputs if it has several."""
    if not isinstance(result, Mapping):
        return result
    answer = {name: value for name, value in result.items() if name not in _ADDED}
    for name in ("output", "outputs"):
        if answer.keys() == {name}:
            return answer[name]
    return answer


def _own(output: Any) -> tuple[str, bytes | None]:
    """Return the content type of an output, and its bytes if it is not JSON."""
    if isinstance(output, str):
        return TEXT, output.encode(errors="replace")
    if not isinstance(output, Mapping) or not {"b64"} <= output.keys() <= {"b64", "type"}:
        return JSON, None
    try:
        content = binascii.a2b_base64(output["b64"], strict_mode=True)
    except (ValueError, TypeError):  # an object of the model's that only looks like one
        return JSON, None
    said = output.get("type")
    return said if isinstance(said, str) and _MEDIA.fullmatch(said) else BYTES, content


def _only(output: Any) -> tuple[str, Any]:
    """Return the only output, with its name if known."""
    if isinstance(output, Mapping) and len(output) == 1:
        ((name, value),) = output.items()
        return str(name), value
    return "", output


def _array(output: Any, dtypes: Mapping[str, str]) -> Array | None:
    """Return an output as an array (null becomes NaN), or None if it is not one.

    A list job gives an array if the outputs of all its inputs have the same shape.
    """
    import numpy as np

    name, value = _only(output)
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        rows = [_array(output_of(one), dtypes) for one in value]
        if any(row is None for row in rows) or len({row.shape for row in rows if row is not None}) > 1:
            return None
        return np.stack([row for row in rows if row is not None])
    if isinstance(value, str) or value is None:
        return None
    try:
        if isinstance(value, Mapping):
            if value.keys() != _ARRAY:
                return None
            kind = np.dtype(value["dtype"]).newbyteorder("<")
            return np.frombuffer(binascii.a2b_base64(value["b64"]), kind).reshape(value["shape"])
        array = np.asarray(value)
        if array.dtype == object:  # with nulls
            array = np.asarray(value, np.float64)
        if array.dtype.kind not in "biuf":
            return None
        return array.astype(dtypes[name]) if name in dtypes else array
    except (ValueError, TypeError):  # lists of different lengths, or not numbers
        return None


def _no_array(output: Any) -> str:
    if isinstance(output, Mapping) and len(output) > 1:
        return f"it has several values ({', '.join(map(str, output))[:120]}), but a .npy file holds one array"
    return "it is not an array of numbers"


def _npy(array: Array) -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return file.getvalue()
