# SPDX-License-Identifier: Apache-2.0
"""Routes that FastAPI only documents; ``front`` and ``oip.routes`` serve them."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter

JsonSchema = dict[str, Any]


class ServedElsewhere(Exception):
    """Raised if FastAPI gets a request for such a route."""


async def _served_elsewhere() -> None:  # without a docstring, which /docs would show
    raise ServedElsewhere


def document(
    router: APIRouter,
    method: str,
    path: str,
    summary: str,
    responses: dict[int | str, JsonSchema],
    description: str = "",
    *,
    status: int = 200,
    extra: JsonSchema | None = None,
    shown: bool = True,
) -> None:
    """Document a route. ``path`` is FastAPI's; ``extra`` is more of its operation: body, parameters."""
    named = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)", path)
    ]
    operation = dict(extra or {})
    if parameters := [*named, *operation.get("parameters", ())]:
        operation["parameters"] = parameters
    router.add_api_route(
        path,
        _served_elsewhere,
        methods=[method],
        status_code=status,
        summary=summary,
        description=description,
        responses=responses,
        openapi_extra=operation,
        operation_id=f"{method}{path.replace(':path', '')}".lower().translate(str.maketrans("/{}", "___")),
        include_in_schema=shown,
    )
