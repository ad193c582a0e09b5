# SPDX-License-Identifier: Apache-2.0
"""``/docs`` and ``/openapi.json``, with the examples of the models that the fleet knows now."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html

from gpuinfer.api.answers import answer
from gpuinfer.client import AsyncClient
from gpuinfer.errors import GpuinferError

URL = "/openapi.json"
#: Models whose examples are shown.
MOST = 50


def add_docs(app: FastAPI) -> None:
    """Add the routes. The application must have been made with ``openapi_url=None``."""

    async def openapi(request: Request) -> Response:
        spec = copy.deepcopy(app.openapi())
        try:
            found = await _examples(request.app.state.client)
        except GpuinferError:  # without Redis the rest is as true
            found = {}
        for path, many in (("/predict", False), ("/batch_predict", True)):
            body = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            body["examples"] |= {
                f"model {name}": {
                    "summary": f"The example of {name}",
                    "value": {"inputs": [value] if many else value, "model": name},
                }
                for name, value in found.items()
            }
        return answer(spec)

    async def swagger(request: Request) -> Response:
        return get_swagger_ui_html(openapi_url=_below(request), title=f"{app.title} - Swagger UI")

    async def redoc(request: Request) -> Response:
        return get_redoc_html(openapi_url=_below(request), title=f"{app.title} - ReDoc")

    for path, route in ((URL, openapi), ("/docs", swagger), ("/redoc", redoc)):
        app.add_api_route(path, route, include_in_schema=False)


def _below(request: Request) -> str:
    """Return where the description is, also behind a proxy that cuts a prefix off."""
    return str(request.scope.get("root_path", "")).rstrip("/") + URL


async def _examples(client: AsyncClient) -> dict[str, Any]:
    """Return model -> its example."""
    found: dict[str, Any] = {}
    for name in (await client.fleet()).known[:MOST]:
        signature = await client.takes(name)
        if signature is not None and signature.example is not None:
            found[name] = signature.example
    return found
