# SPDX-License-Identifier: Apache-2.0
"""Celery's commands ``revoke`` and ``terminate``, as our cancel: what Flower and ``celery control`` send.

Celery's own would read a task's state, and write its end in a second step, over one that another worker has
written in between; and a task that runs would be left to a pool of processes, which there is not. Every
worker hears a command: the first one ends the task, the others find it ended.
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

#: How many bytes of a state are looked at to tell how its task is.
_HEAD_BYTES = 31


def register() -> None:
    """Put these two in the place of Celery's."""
    control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")(revoke)
    control_command(
        name="terminate",
        variadic="task_id",
        args=[("signal", str)],
        signature="<signal> [id1 [id2 [... [idN]]]]",
    )(terminate)


def revoke(panel: Any, task_id: Any, terminate: bool = False, **_: Any) -> dict[str, str]:
    """End tasks that wait as revoked; with terminate those that run, too, whose results are dropped."""
    ids = [str(one) for one in maybe_list(task_id) or ()]
    batcher = panel.consumer.controller.gpuinfer.batcher
    store = batcher.store
    try:
        ended, left = cancel(store.client, ids, panel.app.gpuinfer_settings().queue, running=terminate)
        over = {ids[position] for position in store.ended(ids)} if terminate and ids else set()
    except (redis.RedisError, OSError, InputError) as exc:
        log.warning("not_revoked", task_ids=ids, reason=str(exc))
        return {"error": f"not revoked: {exc}"}
    # Also ends what a worker holds already, and is seen by `celery inspect revoked`. An id stays there for
    # hours: not that of a task that goes on, or may be sent again under it.
    flagged = [one for one in ids if one not in left]
    state.revoked.update(flagged)
    # Whichever worker has ended them; the result of a task whose end is not written must not be dropped.
    batcher.cancelled(over)
    if ended:
        log.info("revoked", task_ids=ended)
    said = [f"tasks {', '.join(flagged)} flagged as revoked"] if flagged else []
    said += [f"tasks {', '.join(left)} left as they are: they run, or have ended"] if left else []
    return {"ok": "; ".join(said)}


def terminate(panel: Any, signal: str, task_id: Any, **_: Any) -> dict[str, str]:
    """End tasks whether they run or wait. No signal is sent: a batch has other tasks in it."""
    return revoke(panel, task_id, terminate=True)


def cancel(
    client: redis.Redis, ids: Sequence[str], settings: QueueSettings, *, running: bool
) -> tuple[list[str], list[str]]:
    """End tasks that have not ended; those that run only if ``running``.

    Returns the ids of those it ended, and of those that it left: they run, have completed or have failed.
    Raises InputError for what is no id, redis-py's errors.
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
    """Tell whether a task's state is one of these."""
    head = client.getrange(key, 0, _HEAD_BYTES)
    return any(b'"%b"' % status in head for status in statuses)
