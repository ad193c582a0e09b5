# SPDX-License-Identifier: Apache-2.0
"""The parameters of a URL: those that a route knows, each once."""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.types import Scope

from gpuinfer.errors import InputError, UnknownParameter

_NONE: dict[str, str] = {}


def parse(scope: Scope, allowed: frozenset[str]) -> dict[str, str]:
    """Return a request's query parameters. Raises UnknownParameter, and InputError for one given twice."""
    text: bytes = scope["query_string"]
    if not text:
        return dict(_NONE)
    found: dict[str, str] = {}
    for name, value in parse_qsl(text.decode("latin-1"), keep_blank_values=True):
        if name not in allowed:
            known = f"known here: {', '.join(sorted(allowed))}" if allowed else "none is known here"
            raise UnknownParameter(f"unknown query parameter; {known}", name[:80])
        if name in found:
            raise InputError("is given twice in the URL", name)
        found[name] = value
    return found
