# SPDX-License-Identifier: Apache-2.0
"""What a worker holds and has not run: kept in the order of serving, picked as batches. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gpuinfer.worker.work import Work


@dataclass(frozen=True, slots=True)
class Part:
    """The inputs ``start`` to ``stop`` of one task, in a batch."""

    work: Work
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes: parts of one model, under one pair of time limits."""

    model: str
    parts: tuple[Part, ...]
    soft_limit_s: float
    hard_limit_s: float

    @property
    def size(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    @property
    def works(self) -> list[Work]:
        return [part.work for part in self.parts]


def _order(work: Work) -> tuple[int, int]:
    return work.order


class Buffer:
    """Tasks that are claimed and wait for the device.

    ``limit`` gives a model's largest batch.
    """

    def __init__(self, limit: Callable[[str], int]) -> None:
        self._works: list[Work] = []
        self._limit = limit
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._works)

    def add(self, work: Work) -> None:
        """Put a task at its place: after its equals when new, before them when it comes back."""
        if not work.arrival:
            self._arrivals += 1
            work.arrival = self._arrivals
        insort(self._works, work, key=_order)

    def remove(self, works: Iterable[Work]) -> None:
        gone = {id(work) for work in works}
        self._works = [work for work in self._works if id(work) not in gone]

    def clear(self) -> list[Work]:
        """Empty the buffer and return what it held, in order."""
        works, self._works = self._works, []
        return works

    def due(self, now: float) -> int:
        """Return how many tasks wait for the device alone, not for a time."""
        return sum(1 for work in self._works if work.not_before <= now)

    def rank_at(self, position: int) -> int | None:
        """Return the rank of the task at ``position`` in the order, None when there are fewer."""
        return self._works[position].claimed.rank if position < len(self._works) else None

    def next_batch(self, now: float) -> Batch | None:
        """Return the next batch without removing it: the most urgent task and its fellows, in order.

        Fellows share its model and its time limits. A task that must run alone gets a batch to itself.
        ``now`` is monotonic; a task waiting for its retry is passed over.
        """
        first = next((work for work in self._works if work.not_before <= now), None)
        if first is None:
            return None
        room = self._limit(first.model)
        parts: list[Part] = []
        for work in self._works:
            if room <= 0:
                break
            if work is not first and (first.alone or not _fellows(first, work, now)):
                continue
            start = len(work.outcomes)
            count = min(work.left, room)
            parts.append(Part(work, start, start + count))
            room -= count
        works = [part.work for part in parts]
        soft_s = min(min(work.soft_limit_s, work.soft_total_s - work.ran_s) for work in works)
        hard_s = min(min(work.hard_limit_s, work.hard_total_s - work.ran_s) for work in works)
        return Batch(first.model, tuple(parts), soft_s, hard_s)


def _fellows(first: Work, other: Work, now: float) -> bool:
    return (
        other.model == first.model
        and not other.alone
        and other.not_before <= now
        and other.soft_limit_s == first.soft_limit_s
        and other.hard_limit_s == first.hard_limit_s
    )
