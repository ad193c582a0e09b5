# SPDX-License-Identifier: Apache-2.0
"""Tasks with an ETA: they wait in Redis, not in a worker, until they are due by Redis's clock.

Due tasks are moved into their lists by each claim, by the timer of an idle worker, and by the watcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis

from gpuinfer.queue.direct import Direct
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QueueSettings

#: Maximum tasks and bytes moved by one call, so that it blocks Redis only for some milliseconds.
MOVED_TASKS, MOVED_BYTES = 1000, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Postponed:
    """The result of postponing tasks: all now wait in Redis, except these."""

    #: Positions of tasks that are already due by Redis's clock.
    due: frozenset[int]
    #: Positions of tasks that cannot wait; ``why``: the reason.
    refused: frozenset[int]
    why: str


def move_due(client: redis.Redis) -> int:
    """Move due tasks into their lists; return how many. Raises redis-py's errors."""
    moved, _ = bind(client, "due")(args=[MOVED_TASKS, MOVED_BYTES])
    return int(moved)


class Later:
    """What a worker does about tasks that wait for their ETA."""

    def __init__(
        self,
        client: redis.Redis,
        direct: Direct,
        inflight: str,
        settings: QueueSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._due = direct.bind("due")
        self._postpone = bind(client, "postpone")
        self._inflight = inflight
        self._settings = settings
        self._clock = clock
        #: When the next task is due: the text in Redis, and the time by this process's clock.
        self._known = b""
        self._due_at = 0.0

    def move_due(self, due: bytes) -> int:
        """Move due tasks into their lists; return how many. ``due``: the value of ``keys.DUE``.

        Redis is called only if that value is new, or if its time has come by this process's clock, which may
        differ from Redis's.
        """
        if due == self._known and self._clock() < self._due_at:
            return 0
        moved, left_ms = self._due(keys=[], args=[MOVED_TASKS, MOVED_BYTES])
        self._known = due
        self._due_at = self._clock() + max(0, left_ms) / 1000
        return int(moved)

    def postpone(self, tasks: Sequence[tuple[int, float]]) -> Postponed:
        """Move tasks, given as (seq, due in seconds since the epoch), from flight to those that wait."""
        args = [self._settings.max_later, *(part for seq, due in tasks for part in (seq, f"{due:.6f}"))]
        due, refused, why = self._postpone(keys=[self._inflight], args=args)
        reason = why.decode(errors="replace")
        if not reason:
            reason = (
                f"too many tasks wait for their ETA already; queue.max_later is {self._settings.max_later}"
            )
        return Postponed(frozenset(at - 1 for at in due), frozenset(at - 1 for at in refused), reason)
