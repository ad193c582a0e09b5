# SPDX-License-Identifier: Apache-2.0
"""The routes. Bodies are read by hand: counted while they come in, parsed once, never validated twice."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gpuinfer.api import admission, schemas, uploads
from gpuinfer.api.answers import answer
from gpuinfer.api.middleware import note
from gpuinfer.client import AsyncClient, Options
from gpuinfer.errors import InputError, MalformedJson
from gpuinfer.queue.message import BATCH_PREDICT, PREDICT, ROUTES
from gpuinfer.queue.results import TaskStatus
from gpuinfer.settings import Settings

router = APIRouter()


def _client(request: Request) -> AsyncClient:
    client: AsyncClient = request.app.state.client
    return client


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def read_body(request: Request, max_payload_bytes: int) -> bytes:
    """Read a body, chunked or not. Raises PayloadTooLarge as soon as it is known to be too large."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise MalformedJson(f"the body is compressed ({encoding[:40]}); send plain JSON")
    announced = request.headers.get("content-length", "")
    admission.check_size(int(announced) if announced.isdecimal() else 0, max_payload_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        admission.check_size(len(body), max_payload_bytes)
    return bytes(body)


async def _submit(request: Request, *, many: bool) -> Response:
    settings = _settings(request)
    body = await read_body(request, settings.queue.max_payload_bytes)
    asked = _understood(request, body, many=many)
    client = _client(request)
    submit = client.submit_batch if many else client.submit
    task_id = await submit(asked.inputs, **asked.options)
    note(
        request.scope,
        action="task_accepted",
        task_id=task_id,
        **_described(asked.options, client.default_model, many=many),
    )
    return answer({"task_id": task_id}, 202, {"location": f"/result/{task_id}"})


def _understood(request: Request, body: bytes, *, many: bool) -> admission.Admission:
    """Understand a body by its Content-Type: JSON, a form, or a file."""
    content_type = request.headers.get("content-type", "")
    key = request.headers.get("idempotency-key")
    if uploads.holds_json(body, content_type):
        return admission.admit(body, header_key=key)
    if many:
        raise InputError(
            f"a job is a list in JSON, and the body is {content_type[:80]}; files go to /predict one by one",
            "body",
        )
    return uploads.admit_upload(body, content_type, request.query_params, header_key=key)


def _described(options: Options, default_model: str | None, *, many: bool) -> dict[str, str | int | None]:
    """Return what the log tells of a task."""
    return {
        "queue": options.get("queue") or ROUTES[BATCH_PREDICT if many else PREDICT],
        "model": options.get("model") or default_model,
        "priority": options.get("priority", 0),
    }


@router.post(
    "/predict",
    status_code=202,
    tags=["predict"],
    summary="Submit one input",
    responses=schemas.SUBMIT_RESPONSES,
    openapi_extra=schemas.PREDICT_BODY,
)
async def predict(request: Request) -> Response:
    """Put one input into a queue. The body is the input, or an object with it and options beside it.

    A file is sent as it is, with options in the URL, or in a form, with options beside it.
    """
    return await _submit(request, many=False)


@router.post(
    "/batch_predict",
    status_code=202,
    tags=["predict"],
    summary="Submit a list of inputs as one job",
    responses=schemas.SUBMIT_RESPONSES,
    openapi_extra=schemas.BATCH_BODY,
)
async def batch_predict(request: Request) -> Response:
    """Put a list of inputs into a queue as one task; its result is a list, an entry for each input."""
    return await _submit(request, many=True)


@router.get(
    "/result/{task_id:path}",
    tags=["result"],
    summary="The state of a task, and its result",
    responses=schemas.RESULT_RESPONSES,
)
async def result(
    request: Request,
    task_id: str,
    wait: Annotated[
        str | None, Query(description="Seconds to wait for the task to end, cut to api.max_wait_s.")
    ] = None,
) -> Response:
    """Answer at once, or with `wait` as soon as the task has ended. A failed task is a 200, too.

    An id that nothing is known of is a 404; with `wait`, when it has not ended by then.
    """
    note(request.scope, task_id=task_id)
    seconds = admission.waiting_time(wait, _settings(request).api.max_wait_s)
    return answer((await _wait(request, task_id, seconds)).to_dict())


async def _wait(request: Request, task_id: str, seconds: float) -> TaskStatus:
    """Wait for the end of a task, of the time, of the caller's patience, or of this process."""
    client = _client(request)
    if seconds <= 0:
        return await client.status(task_id)
    ending = asyncio.ensure_future(client.wait(task_id, seconds))
    stopping = asyncio.ensure_future(request.app.state.stopping.wait())
    leaving = asyncio.ensure_future(_disconnected(request))
    others = (stopping, leaving)
    try:
        await asyncio.wait((ending, *others), return_when=asyncio.FIRST_COMPLETED)
        return await ending if ending.done() else await client.status(task_id)
    finally:
        for task in (ending, *others):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    return answer({**status.to_dict(), "cancelled": cancelled or status.state == "revoked"})


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
