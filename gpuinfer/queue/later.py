# SPDX-License-Identifier: Apache-2.0
"""Tasks with an ETA: they wait in Redis, not in a worker, until they are due by Redis's clock.

A claim moves what is due into its list first; so does a worker's timer while it is idle, and the watcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis

from gpuinfer.queue.direct import Direct
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QueueSettings

#: What one call moves at most: it keeps Redis for some milliseconds.
MOVED_TASKS, MOVED_BYTES = 1000, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Postponed:
    """What became of tasks that were to wait: all wait in Redis by now but these."""

    #: Positions of those that are due by Redis's clock.
    due: frozenset[int]
    #: Positions of those that cannot wait, and why not.
    refused: frozenset[int]
    why: str


def move_due(client: redis.Redis) -> int:
    """Put what is due into its lists; return how many tasks were. Raises redis-py's errors."""
    moved, _ = bind(client, "due")(args=[MOVED_TASKS, MOVED_BYTES])
    return int(moved)


class Later:
    """A worker's side of the tasks that wait for their ETA."""

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
        #: What Redis has said when the next task is due, and when that is by the own clock.
        self._known = b""
        self._due_at = 0.0

    def look(self, due: bytes) -> int:
        """Put what is due into its lists; return how many tasks. ``due``: when the next one is, by Redis.

        Redis is asked when it says something new, and when the time has come: the clocks may differ.
        """
        if due == self._known and self._clock() < self._due_at:
            return 0
        moved, left_ms = self._due(keys=[], args=[MOVED_TASKS, MOVED_BYTES])
        self._known = due
        self._due_at = self._clock() + max(0, left_ms) / 1000
        return int(moved)

    def postpone(self, tasks: Sequence[tuple[int, float]]) -> Postponed:
        """Move (seq, due in seconds since the epoch) from flight to the tasks that wait."""
        args = [self._settings.max_later, *(part for seq, due in tasks for part in (seq, f"{due:.6f}"))]
        due, refused, why = self._postpone(keys=[self._inflight], args=args)
        reason = why.decode(errors="replace")
        if not reason:
            reason = (
                f"too many tasks wait for their ETA already; queue.max_later is {self._settings.max_later}"
            )
        return Postponed(frozenset(at - 1 for at in due), frozenset(at - 1 for at in refused), reason)
