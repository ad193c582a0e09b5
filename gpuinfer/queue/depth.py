# SPDX-License-Identifier: Apache-2.0
"""How much waits, how much is in flight, and how many dead letters there are: one look, no payloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from gpuinfer.queue import keys
from gpuinfer.settings import QUEUES


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """The queues at one moment."""

    #: Queue -> priority -> tasks that wait; empty priorities are left out.
    waiting: Mapping[str, Mapping[int, int]]
    #: Worker (``gpu0@host``) -> tasks it has claimed and not settled.
    inflight: Mapping[str, int]
    dead_letters: int

    @property
    def total_waiting(self) -> int:
        """Return how many tasks wait in all queues."""
        return sum(sum(levels.values()) for levels in self.waiting.values())

    @property
    def total_inflight(self) -> int:
        """Return how many tasks all workers hold."""
        return sum(self.inflight.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; priorities become text, as JSON's keys are."""
        queues = {
            queue: {"waiting": sum(levels.values()), "by_priority": {str(p): n for p, n in levels.items()}}
            for queue, levels in self.waiting.items()
        }
        return {
            "queues": queues,
            "waiting": self.total_waiting,
            "in_flight": dict(self.inflight),
            "dead_letters": self.dead_letters,
        }


def workers_in_flight(client: redis.Redis) -> list[str]:
    """Return the workers that hold tasks. Walks over all keys (SCAN), blocking nobody."""
    found = client.scan_iter(match=f"{keys.INFLIGHT_PREFIX}*", count=1000)
    return sorted({key.decode().removeprefix(keys.INFLIGHT_PREFIX) for key in found})


def look(client: redis.Redis, workers: Sequence[str] | None = None) -> Depth:
    """Count in one pipeline. Without ``workers``, those that hold tasks are looked for first."""
    names = workers_in_flight(client) if workers is None else list(workers)
    lists = keys.serving_order(QUEUES)
    with client.pipeline(transaction=False) as pipe:
        for list_key in lists:
            pipe.llen(list_key)
        for name in names:
            pipe.hlen(keys.inflight(name))
        pipe.hlen(keys.DEAD)
        counts = [int(count) for count in pipe.execute()]
    waiting: dict[str, dict[int, int]] = {queue: {} for queue in QUEUES}
    for list_key, count in zip(lists, counts, strict=False):
        queue, priority = keys.split_list_key(list_key)
        if count:
            waiting[queue][priority] = count
    # Two fields a task, and perhaps one that notes what runs.
    held = {name: fields // 2 for name, fields in zip(names, counts[len(lists) : -1], strict=True)}
    return Depth(
        waiting=waiting,
        inflight={name: count for name, count in held.items() if count},
        dead_letters=counts[-1],
    )
