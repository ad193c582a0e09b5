# SPDX-License-Identifier: Apache-2.0
"""Celery's commands ``revoke`` and ``terminate`` (from Flower, ``celery control``), implemented as our
cancel.

Celery's own commands read a task's state and write its end in two steps, which could overwrite an end written
in between; and for a running task they rely on a process pool. Every worker receives a command: the first one
ends the task, the others find it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis
from celery.utils.functional import maybe_list
from celery.worker import state
from celery.worker.control import control_command

from gpuinfer.client.origin import Origin
from gpuinfer.client.tasks import cancelling
from gpuinfer.errors import InputError
from gpuinfer.log import get_logger
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QueueSettings

log = get_logger(__name__)

#: Bytes of a state to read for its status.
_HEAD_BYTES = 31


def register() -> None:
    """Replace Celery's two commands."""
    control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")(revoke)
    control_command(
        name="terminate",
        variadic="task_id",
        args=[("signal", str)],
        signature="<signal> [id1 [id2 [... [idN]]]]",
    )(terminate)


def revoke(panel: Any, task_id: Any, terminate: bool = False, **_: Any) -> dict[str, str]:
    """Revoke waiting tasks; with terminate also running ones, whose results are dropped."""
    ids = [str(one) for one in maybe_list(task_id) or ()]
    batcher = panel.consumer.controller.gpuinfer.batcher
    store = batcher.store
    try:
        ended, left = cancel(store.client, ids, panel.app.gpuinfer_settings().queue, running=terminate)
        over = {ids[position] for position in store.ended(ids)} if terminate and ids else set()
    except (redis.RedisError, OSError, InputError) as exc:
        log.warning("not_revoked", task_ids=ids, reason=str(exc))
        return {"error": f"not revoked: {exc}"}
    # Also ends tasks that a worker holds, and shows them in `celery inspect revoked`. An id stays there for
    # hours, so not that of a task that continues or may be retried.
    flagged = [one for one in ids if one not in left]
    state.revoked.update(flagged)
    # Only ids whose end is written, by any worker: the result of another task must not be dropped.
    batcher.cancelled(over)
    if ended:
        log.info("revoked", task_ids=ended)
    said = [f"tasks {', '.join(flagged)} flagged as revoked"] if flagged else []
    said += [f"tasks {', '.join(left)} not revoked: they are running or have ended"] if left else []
    return {"ok": "; ".join(said)}


def terminate(panel: Any, signal: str, task_id: Any, **_: Any) -> dict[str, str]:
    """Cancel waiting and running tasks. No signal is sent, as other tasks share the batch."""
    return revoke(panel, task_id, terminate=True)


def cancel(
    client: redis.Redis, ids: Sequence[str], settings: QueueSettings, *, running: bool
) -> tuple[list[str], list[str]]:
    """Cancel tasks that have not ended; running ones only if ``running``.

    Returns the ids that were cancelled, and those that were not (running, completed or failed). Raises
    InputError for an invalid id, and redis-py's errors.
    """
    origin, script = Origin(), bind(client, "cancel")
    ended, left = [], []
    for task_id in ids:
        _, (key,), args = cancelling(task_id, origin, settings)
        if not running and _stands(client, key, b"STARTED"):
            left.append(task_id)
        elif int(script(keys=[key], args=args)) > 0:
            ended.append(task_id)
        elif _stands(client, key, b"SUCCESS", b"FAILURE"):
            left.append(task_id)
    return ended, left


def _stands(client: redis.Redis, key: str, *statuses: bytes) -> bool:
    """Whether a task's status is one of these."""
    head = client.getrange(key, 0, _HEAD_BYTES)
    return any(b'"%b"' % status in head for status in statuses)
