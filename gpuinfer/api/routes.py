# SPDX-License-Identifier: Apache-2.0
"""Routes served by FastAPI; ``documented`` documents those in ``front.py``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gpuinfer.api import fleet_schemas, predict_schemas, query
from gpuinfer.api.access import caller, changing, check_model
from gpuinfer.api.answers import answer
from gpuinfer.api.middleware import note
from gpuinfer.api.showing import models_for, state
from gpuinfer.client import AsyncClient
from gpuinfer.errors import InputError, UnknownModel
from gpuinfer.queue.usage import USUAL_S, By, since_of
from gpuinfer.settings import Settings

router = APIRouter()
_OF_USAGE = frozenset({"by", "since"})


def _client(request: Request) -> AsyncClient:
    client: AsyncClient = request.app.state.client
    return client


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


@router.post(
    "/cancel/{task_id:path}",
    tags=["result"],
    summary="Cancel a waiting or running task",
    responses=predict_schemas.CANCEL_RESPONSES,
)
async def cancel(request: Request, task_id: str) -> Response:
    """Cancel a waiting or running task, and answer its state; `cancelled` is false if it had already ended.

    A waiting task from a plain Celery producer is not known yet. So an unknown id is cancelled, too; the
    error's message says so.
    """
    note(request.scope, task_id=task_id)
    client = _client(request)
    async with changing(request.scope, task_id) as only:
        cancelled = await client.cancel(task_id, only=only)
    if cancelled:
        note(request.scope, action="task_cancelled")
    status = await client.status(task_id, only=caller(request.scope).readable)
    return answer({**state(request.scope, status), "cancelled": cancelled or status.state == "revoked"})


@router.get(
    "/models",
    tags=["models"],
    summary="The fleet's models",
    responses=fleet_schemas.MODELS_RESPONSES,
)
async def models(request: Request) -> Response:
    """Sorted by name. Requests for a model that is not listed are refused; requests for a model that no
    worker serves now are queued until one does."""
    fleet = await _client(request).fleet()
    return answer(models_for(request.scope, [model.to_dict() for model in fleet.models.values()]))


@router.get(
    "/models/{model}",
    tags=["models"],
    summary="One of the fleet's models",
    responses=fleet_schemas.MODEL_RESPONSES,
)
async def one_model(request: Request, model: str) -> Response:
    """Its entry in `/models`."""
    check_model(request.scope, model)
    fleet = await _client(request).fleet()
    found = models_for(request.scope, [one.to_dict() for one in fleet.models.values()])
    for one in found:
        if one["name"] == model:
            return answer(one)
    known = ", ".join(one["name"] for one in found) or "none"
    raise UnknownModel(f"the fleet knows no model {model[:80]!r}; known: {known}", "model")


@router.get(
    "/usage", tags=["fleet"], summary="Usage by key and model", responses=fleet_schemas.USAGE_RESPONSES
)
async def usage(
    request: Request,
    by: Annotated[str | None, Query(description="Sum by key or by model.")] = None,
    since: Annotated[str | None, Query(description="Time span: 90m, 24h (default), 7d, at most 35d.")] = None,
) -> Response:
    """Requests, bytes and device time by key and model, for whole hours. "-" means no key or no model. Counts
    are at most a second old."""
    given = query.parse(request.scope, _OF_USAGE)
    seconds = since_of(given["since"]) if "since" in given else USUAL_S
    return answer((await _client(request).usage(seconds)).by(_by(given.get("by"))).to_dict())


def _by(text: str | None) -> By | None:
    if text not in (None, "key", "model"):
        raise InputError(f"must be key or model, got {text[:40]!r}", "by")
    return "key" if text == "key" else "model" if text == "model" else None
