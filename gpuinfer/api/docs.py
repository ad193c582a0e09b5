# SPDX-License-Identifier: Apache-2.0
"""``/docs`` and ``/openapi.json``, with the inputs and examples of the fleet's current models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.types import Scope

from gpuinfer.api import docs_page, schemas
from gpuinfer.api.access import sees_model
from gpuinfer.api.answers import answer
from gpuinfer.api.model_schemas import inputs_schema
from gpuinfer.client import AsyncClient
from gpuinfer.errors import GpuinferError
from gpuinfer.models.signature import Signature

URL = "/openapi.json"
#: Paths left out of the description.
PAGES = (URL, "/docs")
#: Maximum number of models shown.
MOST = 50


def add_docs(app: FastAPI) -> None:
    """Add the routes. The application must have been made with ``openapi_url=None``."""

    async def described(request: Request) -> tuple[dict[str, Any], Mapping[str, Signature]]:
        try:
            found = await _signatures(request.scope, request.app.state.client)
        except GpuinferError:  # without Redis, show the rest
            found = {}
        return with_models(app.openapi(), found), found

    async def openapi(request: Request) -> Response:
        return answer((await described(request))[0])

    async def page(request: Request) -> Response:
        spec, found = await described(request)
        content = docs_page.render(spec, found, str(request.base_url).rstrip("/"), _below(request))
        return Response(content, media_type="text/html")

    describe = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = with_errors(describe())
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]  # as in FastAPI's manual
    for path, route in ((URL, openapi), ("/docs", page)):
        app.add_api_route(path, route, include_in_schema=False)


def with_errors(spec: dict[str, Any]) -> dict[str, Any]:
    """Add to each operation the answers common to all, with the one format of errors."""
    for methods in spec["paths"].values():
        for about in methods.values():
            responses = about["responses"]
            if "HTTPValidationError" in str(responses.get("422")):  # FastAPI's error format, which we replace
                del responses["422"]
            for status, common in schemas.COMMON.items():
                responses.setdefault(str(status), copy.deepcopy(common))
    spec.setdefault("components", {})["securitySchemes"] = copy.deepcopy(schemas.SECURITY)
    spec["security"] = [*({name: []} for name in schemas.SECURITY), {}]
    known = spec.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    return spec


def with_models(spec: Mapping[str, Any], signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """Return a copy of the description with each model's schema, and its example if known."""
    whole = copy.deepcopy(dict(spec))
    known = whole.setdefault("components", {}).setdefault("schemas", {})
    for name, one in signatures.items():
        known[f"inputs.{name}"] = {"title": f"inputs of the model {name}", **inputs_schema(one)}
    for path, many in (("/predict", False), ("/batch_predict", True)):
        body = whole["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        body["examples"] |= {
            f"model {name}": {"summary": f"The example of {name}", "value": example_of(name, one, many=many)}
            for name, one in signatures.items()
            if one.example is not None
        }
    return whole


def example_of(name: str, signature: Signature, *, many: bool = False) -> dict[str, Any]:
    """Return the body of a request with the model's example."""
    return {"inputs": [signature.example] if many else signature.example, "model": name}


def _below(request: Request) -> str:
    """Return the path of the description, also behind a proxy that strips a prefix."""
    return str(request.scope.get("root_path", "")).rstrip("/") + URL


async def _signatures(scope: Scope, client: AsyncClient) -> dict[str, Signature]:
    """Return model -> signature, of models that have one and that the caller may use."""
    found: dict[str, Signature] = {}
    known = [name for name in (await client.fleet()).known if sees_model(scope, name)]
    for name in known[:MOST]:
        signature = await client.takes(name)
        if signature is not None:
            found[name] = signature
    return found
