# SPDX-License-Identifier: Apache-2.0
"""What a worker holds and has not run: kept in the order of serving, picked as batches. Pure."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

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


_PLACE = attrgetter("place")
#: Full batches of a model that are kept; what is beyond them is handed back.
KEPT_BATCHES = 2


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
        self._number(work)
        insort(self._works, work, key=_PLACE)

    def add_all(self, works: Iterable[Work]) -> None:
        """Put new tasks at their places; much cheaper than one by one."""
        for work in works:
            self._number(work)
            self._works.append(work)
        self._works.sort(key=_PLACE)

    def _number(self, work: Work) -> None:
        if not work.place:
            self._arrivals += 1
            work.place = work.claimed.rank, self._arrivals

    def remove(self, works: Iterable[Work]) -> None:
        gone = {id(work) for work in works}
        self._works = [work for work in self._works if id(work) not in gone]

    def clear(self) -> list[Work]:
        """Empty the buffer and return what it held, in order."""
        works, self._works = self._works, []
        return works

    def spare(self, now: float) -> int | None:
        """Return how many more inputs fit before some model's next batch is full; 0 or less when one is.

        None when nothing waits. Tasks that wait for their time do not count.
        """
        return min((self._limit(model) - count for model, count in self._waiting(now)), default=None)

    def surplus(self, now: float) -> list[Work]:
        """Return the tasks that come after the full batches of their model that are kept, none begun."""
        left = {model: KEPT_BATCHES * self._limit(model) for model, _ in self._waiting(now)}
        beyond: list[Work] = []
        for work in self._works:
            if work.not_before > now:
                continue
            if left[work.model] <= 0 and not work.begun:
                beyond.append(work)
            left[work.model] -= self._weight(work)
        return beyond

    def _waiting(self, now: float) -> Iterable[tuple[str, int]]:
        counts: dict[str, int] = {}
        for work in self._works:
            if work.not_before <= now:
                counts[work.model] = counts.get(work.model, 0) + self._weight(work)
        return counts.items()

    def _weight(self, work: Work) -> int:
        return self._limit(work.model) if work.alone else len(work.inputs) - len(work.outcomes)

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
        soft_s, hard_s = first.soft_limit_s, first.hard_limit_s
        for part in parts:
            work = part.work
            if work.soft_total_s < math.inf or work.hard_total_s < math.inf:
                soft_s = min(soft_s, work.soft_total_s - work.ran_s)
                hard_s = min(hard_s, work.hard_total_s - work.ran_s)
        return Batch(first.model, tuple(parts), soft_s, hard_s)


def _fellows(first: Work, other: Work, now: float) -> bool:
    return (
        other.model == first.model
        and not other.alone
        and other.not_before <= now
        and other.soft_limit_s == first.soft_limit_s
        and other.hard_limit_s == first.hard_limit_s
    )
