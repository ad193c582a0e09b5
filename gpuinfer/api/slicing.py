# SPDX-License-Identifier: Apache-2.0
"""Where the inputs stand in a body, so that their text can be passed on. Pure; no second parse."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WHITE = b" \t\r\n"
_COLON = re.compile(rb"[ \t\r\n]*:")
#: A body of more strings is searched once for each key, one of fewer from string to string: a search for one
#: byte takes a hundredth of the time, and most large bodies are numbers.
_FEW_STRINGS = 64


def inputs_text(body: bytes, names: Sequence[str] | None) -> bytes | None:
    """Return the text of the inputs in a body of valid JSON; None where that is not plain to see.

    ``names``: the keys of the object that it is, in their order; None: it is the inputs themselves. A body is
    plain when orjson reads it (no NaN) and, as an object, when it has no backslash and each key stands there
    once: then a quoted name can only be the key.
    """
    if _has(body, b"NaN") or _has(body, b"Infinity"):
        return None
    if names is None:
        return body.strip(_WHITE) if body[:1] != b"\xef" else None
    places = None if b"\\" in body else _places(body, [b'"%b"' % name.encode() for name in names])
    if places is None:
        return None
    after = names.index("inputs") + 1
    colon = _COLON.match(body, places[after - 1] + len(b'"inputs"'))
    if colon is None:
        return None
    begin = colon.end()
    end = body.rindex(b"}") if after == len(names) else body.rindex(b",", begin, places[after])
    return body[begin:end].strip(_WHITE)


def _has(body: bytes, text: bytes) -> bool:
    return text[:1] in body and text in body


def _places(body: bytes, quoted: Sequence[bytes]) -> list[int] | None:
    """Return where each of some quoted names begins; None where one of them does not stand there once."""
    strings = _strings(body, max(map(len, quoted)))
    if strings is None:
        return None if any(body.count(name) != 1 for name in quoted) else list(map(body.index, quoted))
    places: dict[bytes, int] = {}
    for at, text in strings:
        if text in quoted and places.setdefault(text, at) != at:
            return None
    return [places[name] for name in quoted]


def _strings(body: bytes, most: int) -> list[tuple[int, bytes]] | None:
    """Return where each string begins, and itself with its quotation marks or, of a long one, ``most`` bytes
    and one; None for many strings. The body is valid JSON without a backslash.
    """
    found: list[tuple[int, bytes]] = []
    end = -1
    while (at := body.find(b'"', end + 1)) >= 0:
        if len(found) == _FEW_STRINGS:
            return None
        end = body.index(b'"', at + 1)
        found.append((at, body[at : min(end, at + most) + 1]))
    return found
