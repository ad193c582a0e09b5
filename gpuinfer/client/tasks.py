# SPDX-License-Identifier: Apache-2.0
"""What both clients do with a task by its id: read its state, cancel, retry, forget. Written as ``Steps``.

``only``: a caller; another caller's task is then treated as unknown. None: any task may be seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

from redis.exceptions import ResponseError

from gpuinfer.client.origin import Origin, prefix_of, reply_channel
from gpuinfer.client.steps import Script, Steps
from gpuinfer.client.submissions import own_key
from gpuinfer.errors import InputError, ResultGone, TaskNotFound, TaskRevoked, WrongState
from gpuinfer.queue import dead, history, keys, results
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.options import MAX_NAME
from gpuinfer.queue.quota import Quota
from gpuinfer.queue.results import TaskStatus
from gpuinfer.queue.submission import keyed
from gpuinfer.settings import QueueSettings


def result_key(task_id: object) -> str:
    """Return the key of a task's state. Raises InputError for an invalid id."""
    if not isinstance(task_id, str) or not 0 < len(task_id) <= MAX_NAME:
        said = f"a text of {len(task_id)} characters" if isinstance(task_id, str) else repr(task_id)[:80]
        raise InputError(f"must be a text of 1 to {MAX_NAME} characters, got {said}", "task_id")
    return keys.result(task_id)


def owned(status: TaskStatus, only: str | None) -> bool:
    """Tell whether ``only`` may see a task: it is that caller's, or no caller's. None may see all."""
    return only is None or status.caller in ("", only)


def not_found(task_id: str) -> TaskNotFound:
    """Return the error for an id that Redis does not know."""
    return TaskNotFound(
        f"no task {task_id}: it was never submitted here, or its result has expired (what a plain Celery "
        "producer has sent is known once it runs)",
        "task_id",
    )


def gone(task_id: str) -> ResultGone:
    """Return the error for an id that was submitted, but whose state Redis no longer has."""
    return ResultGone(f"task {task_id} is known, but its result has expired or was deleted", "task_id")


def known(task_ids: Iterable[str], only: str | None = None) -> Steps[list[int]]:
    """Return 1 for each id that was ever submitted, else 0; [] if the Redis user may not run the script."""
    args = [
        part
        for task_id in task_ids
        for part in (task_id, prefix_of(task_id), keyed(only or "", own_key(task_id)))
    ]
    with suppress(ResponseError):
        return list((yield Script("known", (), args)))
    return []


def _missing(task_id: str, origin: Origin, only: str | None) -> Steps[TaskNotFound]:
    """Return the error for an id that Redis does not know, or that ``only`` may not see."""
    was_known = origin.made(task_id) or (yield from known([task_id], only)) == [1]
    return gone(task_id) if was_known else not_found(task_id)


def status(task_id: str, origin: Origin, only: str | None) -> Steps[TaskStatus]:
    """Return a task's state now. Raises InputError, TaskNotFound, UnreadableResult."""
    key = result_key(task_id)
    try:
        meta = yield "GET", key
    except ResponseError as exc:
        if "WRONGTYPE" in str(exc):
            raise results.unreadable(task_id, "no text") from exc
        raise
    if meta is None:
        raise (yield from _missing(task_id, origin, only))
    found = results.parse(task_id, meta)
    if not owned(found, only):
        raise (yield from _missing(task_id, origin, only))
    return found


def cancel(task_id: str, origin: Origin, settings: QueueSettings, only: str | None) -> Steps[bool]:
    """Cancel a task; return whether it was cancelled. Raises InputError; TaskNotFound if ``only`` may not."""
    answer = int((yield cancelling(task_id, origin, settings, only)))
    if answer < 0:
        raise (yield from _missing(task_id, origin, only))
    return answer > 0


def cancelling(task_id: str, origin: Origin, settings: QueueSettings, only: str | None = None) -> Script:
    """Return the call of the script that cancels. Raises InputError.

    Redis has no state of a plain producer's task while it waits. So its final state is written in advance,
    and the worker that claims it skips it. A task of this process without a state has ended; its result is
    gone.
    """
    key, ttl_s = result_key(task_id), settings.result_ttl_s
    ended = results.failure(task_id, TaskRevoked("it was cancelled"), worker="")
    words = f"it was unknown when it was cancelled; if it arrives within {ttl_s} s, it will not run"
    unknown = results.failure(task_id, TaskRevoked(words), worker="")
    if only or origin.made(task_id):
        unknown = b""
    channel, prefix = reply_channel(task_id), prefix_of(task_id)
    args: list[Argument] = [task_id, ended, ttl_s, channel, unknown, prefix, *_only_args(only)]
    return Script("cancel", [key], args)


def _only_args(only: str | None) -> list[str]:
    """Return ``only`` as arguments of a script: none for None."""
    return [] if only is None else [only]


def retry(task_id: str, origin: Origin, only: str | None, quota: Quota | None) -> Steps[None]:
    """Send a task that failed, or is a dead letter, again.

    Raises WrongState for a task that is neither, or whose inputs are no longer kept; TaskNotFound; InputError
    for one that can never run.
    """
    result_key(task_id)
    text = "" if quota is None else quota.text
    letter = yield "HGET", keys.DEAD, task_id
    if letter is not None:
        if not dead.owned(letter, only):
            raise (yield from _missing(task_id, origin, only))
        list_key, args = dead.revival(task_id, letter)
        dead.revived(task_id, list_key, (yield Script("revive", [list_key], [*args, "", text])))
        return
    failed = yield "HGET", keys.FAILED, task_id
    if failed is not None:
        if not dead.failed_owned(failed, only):
            raise (yield from _missing(task_id, origin, only))
        list_key, args = dead.failed_revival(task_id, failed)
        answer = yield Script("revive", [list_key], [*args, text])
        dead.revived(task_id, list_key, answer, failed=True)
        return
    raise _no_retry((yield from status(task_id, origin, only)))


def _no_retry(status: TaskStatus) -> WrongState:
    """Return the error for a task that cannot be retried."""
    if not status.final:
        return WrongState(f"task {status.id} has not ended: there is nothing to retry", "task_id")
    if status.state == "failed":
        return WrongState(
            f"task {status.id} failed, and its inputs are gone: submit it again. Inputs are kept within "
            "queue.max_failed, max_failed_bytes and failed_ttl_s",
            "task_id",
        )
    state = "cancelled" if status.state == "revoked" else status.state
    return WrongState(f"task {status.id} is {state}: only a failed task can be sent again", "task_id")


def forget(task_id: str, origin: Origin, only: str | None) -> Steps[None]:
    """Delete a task that has ended. Raises WrongState if it has not; TaskNotFound, InputError."""
    key = result_key(task_id)
    answer = int((yield Script("erase", [key], [task_id, *_only_args(only)])))
    if answer == 0:
        raise (yield from _missing(task_id, origin, only))
    if answer < 0:
        waits = "was cancelled, and its message still waits"
        why = "has not ended; cancel it first" if answer == -1 else waits
        raise WrongState(f"task {task_id} {why}", "task_id")


def find(search: history.Search) -> Steps[history.Page]:
    """Return the page of ended tasks that ``search`` describes."""
    while not search.done:
        search.take((yield Script("history", (), search.args)), time.time())
    return search.page
