# SPDX-License-Identifier: Apache-2.0
"""Files in a request: bytes, or ``{"b64": ..., "name": "cat.jpg"}``.

``b64`` holds base64 in a JSON request, and raw bytes in a binary one.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping

from gpuinfer.errors import InputError

_KEYS = frozenset({"b64", "name"})


def is_file(value: object) -> bool:
    """Tell whether a value is a file, and no array in base64."""
    if isinstance(value, Mapping):
        return "b64" in value and _KEYS.issuperset(value)
    return isinstance(value, bytes | bytearray | memoryview)


def bytes_of(value: object, field: str) -> bytes | memoryview:
    """Return the content of a file. Raises InputError for what is none."""
    content = value.get("b64") if isinstance(value, Mapping) and is_file(value) else value
    if isinstance(content, bytes | memoryview):
        return content
    if isinstance(content, bytearray):
        return bytes(content)
    if not isinstance(value, Mapping) or not isinstance(content, str):
        raise InputError(f'must be a file: bytes, or {{"b64": "..."}}; got {_word(value)}', field)
    try:
        return binascii.a2b_base64(content, strict_mode=True)
    except ValueError as exc:
        raise InputError(f"b64 is not valid base64: {exc}", field) from None


def name_of(value: object) -> str:
    """Return the file's plain name as its sender says; empty: it does not."""
    name = value.get("name") if isinstance(value, Mapping) else None
    return name.replace("\\", "/").rpartition("/")[2] if isinstance(name, str) else ""


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object of other keys"
    return "nothing" if value is None else f"a {type(value).__name__}"
