# SPDX-License-Identifier: Apache-2.0
"""JSON answers of the routes that FastAPI serves."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Response

#: A body ends with a newline, for whoever reads it on a terminal; numbers that are not finite become null.
_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(orjson.dumps(body, option=_OPTIONS), status, headers, media_type="application/json")
