# SPDX-License-Identifier: Apache-2.0
"""The Accept header: chooses the offered content type that the client prefers (RFC 9110, 12.5.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class _Range(NamedTuple):
    """One media range of the header, such as ``image/*;q=0.5``."""

    kind: str
    subtype: str
    quality: float

    def fits(self, content_type: str) -> int:
        """Return how specifically this matches a type: 3 exactly, 2 as type/*, 1 as */*; 0: no match."""
        kind, _, subtype = content_type.partition("/")
        if (self.kind, self.subtype) == ("*", "*"):
            return 1
        if self.kind != kind:
            return 0
        return 3 if self.subtype == subtype else 2 if self.subtype == "*" else 0


def best(accept: str, offered: Sequence[str]) -> str | None:
    """Return the preferred type (the first of equals, or without a header); None if none is acceptable."""
    ranges = [found for part in accept.split(",") if (found := _range(part)) is not None]
    if not ranges:
        return offered[0]
    qualities = {one: _quality(one, ranges) for one in offered}
    wanted = max(offered, key=qualities.__getitem__)
    return wanted if qualities[wanted] > 0 else None


def _quality(content_type: str, ranges: Sequence[_Range]) -> float:
    exact, quality = max((one.fits(content_type), one.quality) for one in ranges)
    return quality if exact else 0.0


def _range(text: str) -> _Range | None:
    """Parse a media range; None if it is not one."""
    name, *parameters = text.split(";")
    kind, slash, subtype = name.strip().lower().partition("/")
    if not slash:
        return None
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = math.nan
    return _Range(kind, subtype, quality if 0 <= quality <= 1 else 0.0)
