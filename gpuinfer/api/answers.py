# SPDX-License-Identifier: Apache-2.0
"""JSON answers of the routes that FastAPI serves."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Response

from gpuinfer.queue.results import dump

#: Bodies end with a newline, for terminals.
_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE


def encode(body: Any) -> bytes:
    """Return a body as JSON with a final newline; NaN and infinity become null."""
    return dump(body, _OPTIONS)


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(encode(body), status, headers, media_type="application/json")
