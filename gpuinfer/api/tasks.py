# SPDX-License-Identifier: Apache-2.0
"""A task as a resource: look at it, wait for it, cancel, retry, delete; and what has ended."""

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
    summary="Tasks that have ended",
    responses=task_schemas.LIST_RESPONSES,
    openapi_extra=task_schemas.LIST_PARAMETERS,
)
async def tasks(request: Request) -> Response:
    """The newest first: of the last 10,000, and with `status=failed` of up to 100,000 of a day. `next` is the
    URL of the next page, null at the end."""
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
    summary="The result of a task by itself",
    responses=task_schemas.BARE_RESPONSES,
    openapi_extra=task_schemas.WAIT_PARAMETER,
)
async def bare_result(request: Request, task_id: str) -> Response:
    """The result in its own content type: what a Python model answers as an image, as bytes or as text is
    that; anything else is JSON. `Accept: application/json` asks for JSON, `application/x-npy` for an array as
    a .npy file; 406 where it is none. A task that failed has its error's status; one that has not ended is a
    202 with the task."""
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
    """Return the dtypes of the model's outputs by their names, as far as they are known."""
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
    summary="Cancel a task that waits or runs",
    responses=task_schemas.CANCEL_RESPONSES,
)
async def cancel(request: Request, task_id: str) -> Response:
    """Answer the task as it is then; 409 when it has ended otherwise. To cancel twice is no error."""
    query.parse(request.scope, _NONE)
    note(request.scope, task_id=task_id)
    client, readable = shared(request.scope).client, caller(request.scope).readable
    # 404 for an id that nothing is known of: client.cancel would take it
    await client.status(task_id, only=readable)
    async with changing(request.scope, task_id) as only:
        if await client.cancel(task_id, only=only):
            note(request.scope, action="task_cancelled")
    status = await client.status(task_id, only=readable)
    if status.state != "revoked":
        raise WrongState(f"task {task_id} has ended before: it is {status.state}", "task_id")
    return answer(await shown(request.scope, status))


@router.post(
    "/tasks/{task_id:path}/retry",
    tags=["tasks"],
    summary="Send a task that failed to its queue again",
    responses=task_schemas.RETRY_RESPONSES,
)
async def retry(request: Request, task_id: str) -> Response:
    """A task that failed, or was set aside as a dead letter, waits again, under its id, with the inputs that
    it was sent with. 409 when these are not kept any more, and for any other task."""
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
    summary="Delete a task that has ended",
    responses=task_schemas.DELETE_RESPONSES,
)
async def delete(request: Request, task_id: str) -> Response:
    """Its result goes, and the dead letter that it may be; 409 while it waits or runs."""
    query.parse(request.scope, _NONE)
    note(request.scope, task_id=task_id)
    async with changing(request.scope, task_id) as only:
        await shared(request.scope).client.forget(task_id, only=only)
    note(request.scope, action="task_deleted")
    return Response(status_code=204)


@router.get("/queues", tags=["fleet"], summary="What waits", responses=task_schemas.QUEUES_RESPONSES)
async def queues(request: Request) -> Response:
    """By queue, priority and model; what is in flight, by worker; and how many dead letters there are."""
    query.parse(request.scope, _NONE)
    return answer((await shared(request.scope).client.queues()).to_dict())


@router.get("/workers", tags=["fleet"], summary="Who serves", responses=task_schemas.WORKERS_RESPONSES)
async def workers(request: Request) -> Response:
    """What each worker's last heartbeat says; `alive` is false when it is older than 10 seconds."""
    query.parse(request.scope, _NONE)
    return answer(workers_for(request.scope, await shared(request.scope).client.workers()))
