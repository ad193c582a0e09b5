# SPDX-License-Identifier: Apache-2.0
"""Query parameters of a URL: only known ones, each at most once."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import parse_qsl

from starlette.types import Scope

from gpuinfer.errors import InputError, UnknownParameter

#: Longer queries are not cached.
_SHORT = 100


def parse(scope: Scope, allowed: frozenset[str]) -> dict[str, str]:
    """Return a request's query parameters. Raises UnknownParameter, and InputError for one given twice."""
    text: bytes = scope["query_string"]
    if not text:
        return {}
    return dict(_remembered(text, allowed)) if len(text) <= _SHORT else _parsed(text, allowed)


@lru_cache(maxsize=256)
def _remembered(text: bytes, allowed: frozenset[str]) -> dict[str, str]:
    """Parse a short query, cached. Do not modify the result."""
    return _parsed(text, allowed)


def _parsed(text: bytes, allowed: frozenset[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in parse_qsl(text.decode("latin-1"), keep_blank_values=True):
        if name not in allowed:
            known = f"known here: {', '.join(sorted(allowed))}" if allowed else "this route has none"
            raise UnknownParameter(f"unknown query parameter; {known}", name[:80])
        if name in found:
            raise InputError("must be given only once in the URL", name)
        found[name] = value
    return found
