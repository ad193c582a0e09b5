# SPDX-License-Identifier: Apache-2.0
"""What both clients do with a task whose id they know: its state, cancel, retry, forget; as ``Steps``.

``only`` is the caller who may see a task: another caller's is as if it were unknown; None: all are seen.
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
    """Return where a task's state is kept. Raises InputError for what is no id."""
    if not isinstance(task_id, str) or not 0 < len(task_id) <= MAX_NAME:
        said = f"a text of {len(task_id)} characters" if isinstance(task_id, str) else repr(task_id)[:80]
        raise InputError(f"must be a text of 1 to {MAX_NAME} characters, got {said}", "task_id")
    return keys.result(task_id)


def owned(status: TaskStatus, only: str | None) -> bool:
    """Tell whether a task may be seen by ``only`` (None: by all): it is its own, or nobody's."""
    return only is None or status.caller in ("", only)


def not_found(task_id: str) -> TaskNotFound:
    """Return the error for an id Redis knows nothing of."""
    return TaskNotFound(
        f"no task {task_id}: it was never submitted here, or its result has expired (what a plain Celery "
        "producer has sent is known once it runs)",
        "task_id",
    )


def gone(task_id: str) -> ResultGone:
    """Return the error for an id that was submitted, and of which Redis knows nothing any more."""
    return ResultGone(f"task {task_id} is known, but its result has expired or was deleted", "task_id")


def known(task_ids: Iterable[str], only: str | None = None) -> Steps[list[int]]:
    """Return 1 for each id that was submitted once, else 0. Nothing for a user without the right to know."""
    args = [
        part
        for task_id in task_ids
        for part in (task_id, prefix_of(task_id), keyed(only or "", own_key(task_id)))
    ]
    with suppress(ResponseError):
        return list((yield Script("known", (), args)))
    return []


def _missing(task_id: str, origin: Origin, only: str | None) -> Steps[TaskNotFound]:
    """Return the error for an id that Redis knows nothing of, or that is not ``only``'s."""
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
    """Cancel a task; return whether it was. Raises InputError, TaskNotFound where it is another caller's."""
    answer = int((yield cancelling(task_id, origin, settings, only)))
    if answer < 0:
        raise (yield from _missing(task_id, origin, only))
    return answer > 0


def cancelling(task_id: str, origin: Origin, settings: QueueSettings, only: str | None = None) -> Script:
    """Return the call of the script that cancels. Raises InputError.

    Nothing is known of a plain producer's task while it waits: its end is written in advance, and the worker
    that claims it skips it. A task of this process that nothing is known of has ended; its result is gone.
    """
    key, ttl_s = result_key(task_id), settings.result_ttl_s
    ended = results.failure(task_id, TaskRevoked("it was cancelled"), worker="")
    words = f"nothing was known of it when it was cancelled; should it come within {ttl_s} s, it does not run"
    unknown = results.failure(task_id, TaskRevoked(words), worker="")
    if only or origin.made(task_id):
        unknown = b""
    channel, prefix = reply_channel(task_id), prefix_of(task_id)
    args: list[Argument] = [task_id, ended, ttl_s, channel, unknown, prefix, *_only_args(only)]
    return Script("cancel", [key], args)


def _only_args(only: str | None) -> list[str]:
    """Return ``only`` as the scripts take it: nothing for None."""
    return [] if only is None else [only]


def retry(task_id: str, origin: Origin, only: str | None, quota: Quota | None) -> Steps[None]:
    """Send a task that failed, or is a dead letter, again.

    Raises WrongState for a task that is neither, or whose inputs are not kept any more; TaskNotFound,
    InputError where it can never run.
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
    """Return the error for a task whose inputs are not kept."""
    if not status.final:
        return WrongState(f"task {status.id} has not ended: there is nothing to retry", "task_id")
    if status.state == "failed":
        return WrongState(
            f"task {status.id} failed, and its inputs are gone: submit it again. They are kept within "
            "queue.max_failed, max_failed_bytes and failed_ttl_s",
            "task_id",
        )
    state = "cancelled" if status.state == "revoked" else status.state
    return WrongState(f"task {status.id} is {state}: only one that failed can be sent again", "task_id")


def forget(task_id: str, origin: Origin, only: str | None) -> Steps[None]:
    """Delete a task that has ended. Raises WrongState for one that has not, TaskNotFound, InputError."""
    key = result_key(task_id)
    answer = int((yield Script("erase", [key], [task_id, *_only_args(only)])))
    if answer == 0:
        raise (yield from _missing(task_id, origin, only))
    if answer < 0:
        waits = "was cancelled, and its message still waits"
        why = "has not ended; cancel it first" if answer == -1 else waits
        raise WrongState(f"task {task_id} {why}", "task_id")


def find(search: history.Search) -> Steps[history.Page]:
    """Return a page of tasks that have ended."""
    while not search.done:
        search.take((yield Script("history", (), search.args)), time.time())
    return search.page
