# SPDX-License-Identifier: Apache-2.0
"""``/health/live`` and ``/health/ready``: for load balancers, orchestrators and ``gpuinfer doctor``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Scope

from gpuinfer.api import fleet_schemas, query
from gpuinfer.api.access import NOBODY, caller
from gpuinfer.api.answers import answer
from gpuinfer.client import AsyncClient
from gpuinfer.errors import NotReady, UnknownModel
from gpuinfer.queue.readiness import Capacity

router = APIRouter()
_PARAMETERS = frozenset({"model"})
#: Maximum number of reasons in an error.
_MOST_REASONS = 3


def readiness_for(scope: Scope, capacity: Capacity, model: str | None = None) -> dict[str, Any]:
    """Return ``readiness``; without a key only the status, and not whether a model exists."""
    if caller(scope) is not NOBODY:
        return readiness(capacity, model)
    found = capacity if model is None else capacity.of(model)
    if found.live or found.startable:
        return {"status": "ok" if found.live else "starting"}
    raise NotReady("no worker is alive, and none may be started")


def readiness(capacity: Capacity, model: str | None = None) -> dict[str, Any]:
    """Return the body of a 200: ``{"status": "ok" | "starting", "workers", "startable", "model"?}``.

    Raises NotReady if no worker serves and none may be started, UnknownModel for an unknown model.
    """
    found = capacity if model is None else capacity.of(model)
    about: dict[str, Any] = {"workers": len(found.live), "startable": len(found.startable)}
    if model is not None:
        about["model"] = model
    if found.live:
        return {"status": "ok", **about}
    if found.startable:
        return {"status": "starting", **about}
    if model is not None and capacity.catalogue and not capacity.knows(model):
        known = ", ".join(capacity.catalogue)
        raise UnknownModel(f"the fleet knows no model {model[:80]!r}; known: {known}", "model")
    what = f"model {model}" if model is not None else "any model"
    raise NotReady(
        f"no live worker serves {what}, and no live watcher may start one"
        f"{_reasons(found)}; run gpuinfer doctor on the workers' hosts",
        "model" if model is not None else None,
    )


def _reasons(capacity: Capacity) -> str:
    named = [f"{name}: {why}" for name, why in sorted(capacity.excluded.items())[:_MOST_REASONS]]
    more = len(capacity.excluded) - len(named)
    return f" ({'; '.join(named)}{f'; and {more} more' if more else ''})" if named else ""


@router.get(
    "/health/live", tags=["health"], summary="The process is running", responses=fleet_schemas.LIVE_RESPONSES
)
async def live(request: Request) -> Response:
    """Answer 200 while the process runs."""
    query.parse(request.scope, frozenset())
    return answer({"status": "ok"})


@router.get(
    "/health/ready",
    tags=["health"],
    summary="Requests can be served",
    responses=fleet_schemas.READY_RESPONSES,
)
async def ready(
    request: Request,
    model: Annotated[str | None, Query(description="Check only this model.")] = None,
) -> Response:
    """Answer 200 `ok` if a live worker serves, 200 `starting` if one may be started, else 503.

    A worker is alive while its heartbeat is at most 10 s old.
    """
    query.parse(request.scope, _PARAMETERS)
    client: AsyncClient = request.app.state.client
    await client.ping()
    return answer(readiness_for(request.scope, await client.capacity(), model))
