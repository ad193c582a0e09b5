# SPDX-License-Identifier: Apache-2.0
"""Finds the text of the inputs in a body, to pass it on without parsing it again. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WHITE = b" \t\r\n"
_COLON = re.compile(rb"[ \t\r\n]*:")
#: A body with more strings is searched once per key, one with fewer from string to string: searching for one
#: byte is 100 times faster, and most large bodies are numbers.
_FEW_STRINGS = 64


def inputs_text(body: bytes, names: Sequence[str] | None) -> bytes | None:
    """Return the text of the inputs in a body of valid JSON; None if it cannot be located for certain.

    ``names``: the object's keys in order; None: the body itself is the inputs. It can be located if orjson
    accepts the body (no NaN) and, for an object, if it has no backslash and each quoted key occurs only once.
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
    """Return the offset of each quoted name; None unless each occurs exactly once."""
    strings = _strings(body, max(map(len, quoted)))
    if strings is None:
        return None if any(body.count(name) != 1 for name in quoted) else list(map(body.index, quoted))
    places: dict[bytes, int] = {}
    for at, text in strings:
        if text in quoted and places.setdefault(text, at) != at:
            return None
    return [places[name] for name in quoted]


def _strings(body: bytes, most: int) -> list[tuple[int, bytes]] | None:
    """Return offset and text of each quoted string, cut to ``most + 1`` bytes; None for many strings.

    The body must be valid JSON without a backslash.
    """
    found: list[tuple[int, bytes]] = []
    end = -1
    while (at := body.find(b'"', end + 1)) >= 0:
        if len(found) == _FEW_STRINGS:
            return None
        end = body.index(b'"', at + 1)
        found.append((at, body[at : min(end, at + most) + 1]))
    return found
