# SPDX-License-Identifier: Apache-2.0
"""The routes that FastAPI serves, and the documentation of those in ``front.py``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gpuinfer.api import query, schemas
from gpuinfer.api.answers import answer
from gpuinfer.api.middleware import note
from gpuinfer.api.showing import state
from gpuinfer.client import AsyncClient
from gpuinfer.errors import InputError
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


class _Fast(Exception):
    """Raised by routes that are here for their documentation alone: ``front.py`` serves them."""


@router.post(
    "/predict",
    status_code=202,
    tags=["predict"],
    summary="Submit one input",
    responses=schemas.SUBMIT_RESPONSES,
    openapi_extra=schemas.PREDICT_BODY,
)
async def predict() -> None:
    """Put one input into a queue. The body is the input, or an object with it and options beside it.

    A file is sent as it is, with options in the URL, or in a form, with options beside it. With
    `Prefer: wait=5` or `?wait=5` the answer is 200 and the task when it has ended in time, failed or not.
    """
    raise _Fast


@router.put("/models/{model}/predict", include_in_schema=False)  # what curl -T sends
@router.post(
    "/models/{model}/predict",
    status_code=202,
    tags=["predict"],
    summary="Submit one input to a model",
    responses=schemas.SUBMIT_RESPONSES,
    openapi_extra=schemas.PREDICT_BODY,
)
async def predict_with(model: str) -> None:
    """As `/predict`, for the model that the path names."""
    raise _Fast


@router.post(
    "/batch_predict",
    status_code=202,
    tags=["predict"],
    summary="Submit a list of inputs as one job",
    responses=schemas.SUBMIT_RESPONSES,
    openapi_extra=schemas.BATCH_BODY,
)
async def batch_predict() -> None:
    """Put a list of inputs into a queue as one task; its result is a list, an entry for each input."""
    raise _Fast


@router.put(
    "/tasks/{task_id}",
    status_code=202,
    tags=["predict"],
    summary="Submit one input under an id of your own",
    responses=schemas.PUT_RESPONSES,
    openapi_extra=schemas.PREDICT_BODY,
)
async def put_task(task_id: str) -> None:
    """As `/predict`, and safe to repeat: the same request finds the task that is there, another one is a 409.

    An id has 1 to 200 letters, digits, `_`, `.`, `:` and `-`.
    """
    raise _Fast


@router.get(
    "/result/{task_id:path}",
    tags=["result"],
    summary="The state of a task, and its result",
    responses=schemas.RESULT_RESPONSES,
)
async def result(
    task_id: str,
    wait: Annotated[
        str | None, Query(description="Seconds to wait for the task to end, cut to api.max_wait_s.")
    ] = None,
) -> None:
    """Answer at once, or with `wait` as soon as the task has ended. A failed task is a 200, too.

    An id that nothing is known of is a 404; with `wait`, when it has not ended by then.
    """
    raise _Fast


@router.post(
    "/cancel/{task_id:path}",
    tags=["result"],
    summary="Cancel a task that waits or runs",
    responses=schemas.CANCEL_RESPONSES,
)
async def cancel(request: Request, task_id: str) -> Response:
    """Cancel a task that waits or runs, and answer its state; `cancelled` is false when it had ended.

    Of a task that a plain Celery producer has sent nothing is known while it waits: so an id that nothing is
    known of is cancelled, too, as the error's message says.
    """
    note(request.scope, task_id=task_id)
    client = _client(request)
    cancelled = await client.cancel(task_id)
    if cancelled:
        note(request.scope, action="task_cancelled")
    status = await client.status(task_id)
    return answer({**state(request.scope, status), "cancelled": cancelled or status.state == "revoked"})


@router.get(
    "/models",
    tags=["models"],
    summary="The models the fleet knows",
    responses=schemas.MODELS_RESPONSES,
)
async def models(request: Request) -> Response:
    """List them by name. A request for a model that is not listed is refused; one that no worker serves now
    is queued until one does."""
    fleet = await _client(request).fleet()
    return answer([model.to_dict() for model in fleet.models.values()])


@router.get("/usage", tags=["fleet"], summary="Who has used how much", responses=schemas.USAGE_RESPONSES)
async def usage(
    request: Request,
    by: Annotated[str | None, Query(description="Sum up: key or model.")] = None,
    since: Annotated[str | None, Query(description="A span: 90m, 24h (usual), 7d, at most 35d.")] = None,
) -> Response:
    """Requests, bytes and device time by key and model, in whole hours; "-" stands for none. Counts are a
    second old at most."""
    given = query.parse(request.scope, _OF_USAGE)
    seconds = since_of(given["since"]) if "since" in given else USUAL_S
    return answer((await _client(request).usage(seconds)).by(_by(given.get("by"))).to_dict())


def _by(text: str | None) -> By | None:
    if text not in (None, "key", "model"):
        raise InputError(f"must be key or model: {text[:40]!r}", "by")
    return "key" if text == "key" else "model" if text == "model" else None
