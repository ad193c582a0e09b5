# SPDX-License-Identifier: Apache-2.0
"""Where the inputs stand in a body, so that their text can be passed on. Pure; no second parse."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WHITE = b" \t\r\n"
_COLON = re.compile(rb"[ \t\r\n]*:")


def inputs_text(body: bytes, names: Sequence[str] | None) -> bytes | None:
    """Return the text of the inputs in a body of valid JSON; None where that is not plain to see.

    ``names``: the keys of the object that it is, in their order; None: it is the inputs themselves. A body is
    plain when orjson reads it (no NaN) and, as an object, when it has no backslash and each key stands there
    once: then a quoted name can only be the key.
    """
    if b"NaN" in body or b"Infinity" in body:
        return None
    if names is None:
        return body.strip(_WHITE) if body[:1] != b"\xef" else None
    if b"\\" in body or any(body.count(b'"%b"' % name.encode()) != 1 for name in names):
        return None
    colon = _COLON.match(body, body.index(b'"inputs"') + 8)
    if colon is None:
        return None
    after = names.index("inputs") + 1
    if after == len(names):
        return body[colon.end() : body.rindex(b"}")].strip(_WHITE)
    end = body.index(b'"%b"' % names[after].encode())
    return body[colon.end() : end].rstrip(_WHITE).removesuffix(b",").strip(_WHITE)
