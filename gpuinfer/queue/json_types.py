# SPDX-License-Identifier: Apache-2.0
"""kombu's JSON types, which it writes as ``{"__type__": ..., "__value__": ...}``.

Source: kombu/utils/json.py. Models take numbers, text and bytes, so other types are read as the equivalent
number or text.
"""

from __future__ import annotations

import uuid
from base64 import b64decode
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

_KEYS = {"__type__", "__value__"}


def _number(text: str) -> int | float:
    """Return a decimal as a number: an int if it has no decimal point, else a float."""
    value = Decimal(text)
    return int(value) if value.is_finite() and value.as_tuple().exponent == 0 else float(value)


_READ: Mapping[object, Callable[[Any], Any]] = {
    "bytes": lambda text: text.encode(),
    "base64": b64decode,
    "datetime": str,
    "date": str,
    "time": str,
    "decimal": _number,
    "uuid": lambda fields: str(uuid.UUID(**fields)),
}


def plain(value: Any) -> Any:
    """Return a JSON value with plain values in place of kombu's types.

    Raises ValueError for anything that kombu could not have written, and RecursionError.
    """
    if type(value) is dict:
        if value.keys() == _KEYS:
            return _read(value["__type__"], value["__value__"])
        return {key: plain(item) for key, item in value.items()}
    if type(value) is list:
        return [plain(item) for item in value]
    return value


def _read(kind: object, value: Any) -> Any:
    reader = _READ.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise ValueError(f"unsupported __type__ {kind!r:.40}; supported: {', '.join(map(str, _READ))}")
    try:
        return reader(value)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as exc:
        raise ValueError(f"{value!r:.60} is not a {kind}: {exc}") from None
