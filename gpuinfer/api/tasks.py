# SPDX-License-Identifier: Apache-2.0
"""Tasks as resources: get, wait, cancel, retry, delete, and list ended ones."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from gpuinfer.api import query, task_schemas
from gpuinfer.api.access import caller, changing
from gpuinfer.api.answers import answer
from gpuinfer.api.bare import bare
from gpuinfer.api.middleware import note
from gpuinfer.api.shared import shared
from gpuinfer.api.showing import owned, shown, workers_for
from gpuinfer.api.waiting import until_ended, waiting_time
from gpuinfer.errors import WrongState
from gpuinfer.queue.history import USUAL
from gpuinfer.queue.results import TaskStatus

router = APIRouter()

_WAIT = frozenset({"wait"})
_LISTED = frozenset({"status", "model", "before", "limit"})
_NONE: frozenset[str] = frozenset()


@router.get(
    "/tasks",
    tags=["tasks"],
    summary="Ended tasks",
    responses=task_schemas.LIST_RESPONSES,
    openapi_extra=task_schemas.LIST_PARAMETERS,
)
async def tasks(request: Request) -> Response:
    """The newest first, from the last 10,000; with `status=failed`, from up to 100,000 of the last day.
    `next` is the URL of the next page, null at the end."""
    given = query.parse(request.scope, _LISTED)
    limit = given.get("limit", str(USUAL))
    page = await shared(request.scope).client.tasks(
        status=given.get("status"),
        model=given.get("model"),
        before=given.get("before"),
        only=caller(request.scope).readable,
        limit=int(limit) if limit.isascii() and limit.isdecimal() and len(limit) < 10 else -1,
    )
    url = None
    if page.before is not None:
        url = str(request.url.include_query_params(before=page.before).replace(scheme="", netloc=""))
    listed = [owned(request.scope, task.to_dict(), task.caller) for task in page.tasks]
    return answer({"tasks": listed, "next": url})


@router.get(
    "/tasks/{task_id:path}/result",
    tags=["tasks"],
    summary="Only the result of a task",
    responses=task_schemas.BARE_RESPONSES,
    openapi_extra=task_schemas.WAIT_PARAMETER,
)
async def bare_result(request: Request, task_id: str) -> Response:
    """The result in its own content type: an image, bytes or text from a Python model, else JSON. With
    `Accept: application/json` it is JSON, with `application/x-npy` a .npy file (406 if it is not an array). A
    failed task has its error's status; one that has not ended is a 202 with the task."""
    status = await _ended(request, task_id)
    if not status.final:
        return answer(await shown(request.scope, status), 202)
    if status.error is not None:
        raise status.error
    accept = ",".join(request.headers.getlist("accept"))
    dtypes = await _dtypes(request, status) if "npy" in accept else None
    # Decoding base64 of many megabytes takes a while, in which others are served.
    found = await asyncio.to_thread(bare, status.result, accept, dtypes)
    headers = {"vary": "accept", "x-content-type-options": "nosniff"}
    return Response(found.content, media_type=found.media_type, headers=headers)


async def _dtypes(request: Request, status: TaskStatus) -> dict[str, str]:
    """Return output name -> dtype of the model, as far as known."""
    model = status.about.get("model")
    signature = await shared(request.scope).client.takes(model, fresh=False) if model else None
    return {one.name: one.dtype for one in (signature.outputs if signature else ()) if one.dtype}


@router.get(
    "/tasks/{task_id:path}",
    tags=["tasks"],
    summary="A task",
    responses=task_schemas.TASK_RESPONSES,
    openapi_extra=task_schemas.WAIT_PARAMETER,
)
async def task(request: Request, task_id: str) -> Response:
    """Answer at once, or with `wait` as soon as the task has ended. A failed task is a 200, too."""
    return answer(await shown(request.scope, await _ended(request, task_id)))


async def _ended(request: Request, task_id: str) -> TaskStatus:
    note(request.scope, task_id=task_id)
    given = query.parse(request.scope, _WAIT)
    seconds = waiting_time(given.get("wait"), shared(request.scope).settings.api.max_wait_s)
    return await until_ended(request.scope, request.receive, task_id, seconds)


@router.post(
    "/tasks/{task_id:path}/cancel",
    tags=["tasks"],
    summary="Cancel a waiting or running task",
    responses=task_schemas.CANCEL_RESPONSES,
)
async def cancel(request: Request, task_id: str) -> Response:
    """Answer the cancelled task; 409 if it had already ended. Cancelling twice is not an error."""
    query.parse(request.scope, _NONE)
    note(request.scope, task_id=task_id)
    client, readable = shared(request.scope).client, caller(request.scope).readable
    # 404 for an unknown id, which client.cancel would accept
    await client.status(task_id, only=readable)
    async with changing(request.scope, task_id) as only:
        if await client.cancel(task_id, only=only):
            note(request.scope, action="task_cancelled")
    status = await client.status(task_id, only=readable)
    if status.state != "revoked":
        raise WrongState(f"task {task_id} has already ended: it is {status.state}", "task_id")
    return answer(await shown(request.scope, status))


@router.post(
    "/tasks/{task_id:path}/retry",
    tags=["tasks"],
    summary="Retry a failed task",
    responses=task_schemas.RETRY_RESPONSES,
)
async def retry(request: Request, task_id: str) -> Response:
    """Queue a failed task or a dead letter again, with the same id and inputs. 409 if its inputs are not kept
    any more, and for any other task."""
    query.parse(request.scope, _NONE)
    note(request.scope, task_id=task_id)
    client = shared(request.scope).client
    async with changing(request.scope, task_id) as only:
        key = caller(request.scope).key
        quota = None if key is None or only is None else key.quota
        await client.retry(task_id, only=only, quota=quota)
    note(request.scope, action="task_retried")
    status = await client.status(task_id, only=caller(request.scope).readable)
    return answer(await shown(request.scope, status), 202)


@router.delete(
    "/tasks/{task_id:path}",
    status_code=204,
    tags=["tasks"],
    summary="Delete an ended task",
    responses=task_schemas.DELETE_RESPONSES,
)
async def delete(request: Request, task_id: str) -> Response:
    """Delete its result, and its dead letter if it is one; 409 while it waits or runs."""
    query.parse(request.scope, _NONE)
    note(request.scope, task_id=task_id)
    async with changing(request.scope, task_id) as only:
        await shared(request.scope).client.forget(task_id, only=only)
    note(request.scope, action="task_deleted")
    return Response(status_code=204)


@router.get("/queues", tags=["fleet"], summary="The queues", responses=task_schemas.QUEUES_RESPONSES)
async def queues(request: Request) -> Response:
    """Waiting tasks by queue, priority and model; tasks in flight by worker; number of dead letters."""
    query.parse(request.scope, _NONE)
    return answer((await shared(request.scope).client.queues()).to_dict())


@router.get("/workers", tags=["fleet"], summary="The workers", responses=task_schemas.WORKERS_RESPONSES)
async def workers(request: Request) -> Response:
    """Each worker's last heartbeat; `alive` is false if it is older than 10 seconds."""
    query.parse(request.scope, _NONE)
    return answer(workers_for(request.scope, await shared(request.scope).client.workers()))
