# SPDX-License-Identifier: Apache-2.0
"""What a worker holds and has not run: kept in the order of serving, picked as batches. Pure."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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


_PLACE, _TIME = attrgetter("place"), attrgetter("not_before")
#: The rank of a task whose list was passed over for too long, until a batch has begun.
AGED = -1
#: Full batches of a model that are kept; what is beyond them is handed back.
KEPT_BATCHES = 2


class Buffer:
    """Tasks that are claimed and wait for the device, or for their time.

    ``limit`` gives a model's largest batch.
    """

    def __init__(self, limit: Callable[[str], int]) -> None:
        #: Those that could run now, in their order; and those that wait for a time, the first due first.
        self._works: list[Work] = []
        self._later: list[Work] = []
        self._limit = limit
        self._arrivals = 0
        self._aged = False

    def __len__(self) -> int:
        return len(self._works) + len(self._later)

    def __iter__(self) -> Iterator[Work]:
        return chain(self._works, self._later)

    @property
    def ready(self) -> Sequence[Work]:
        """Those that wait for nothing but the device, in their order."""
        return self._works

    def add(self, work: Work) -> None:
        """Put a task at its place: after its equals when new, before them when it comes back."""
        self._number(work)
        if work.not_before:
            insort(self._later, work, key=_TIME)
        else:
            insort(self._works, work, key=_PLACE)

    def add_all(self, works: Iterable[Work]) -> None:
        """Put new tasks at their places; much cheaper than one by one."""
        for work in works:
            self._number(work)
            (self._later if work.not_before else self._works).append(work)
        self._works.sort(key=_PLACE)
        self._later.sort(key=_TIME)

    def _number(self, work: Work) -> None:
        if not work.place[1]:
            self._arrivals += 1
            work.place = AGED if work.claimed.aged else work.claimed.rank, self._arrivals
            self._aged |= work.claimed.aged

    def wake(self, now: float) -> None:
        """Let those run whose time has come; ``now`` is monotonic."""
        while self._later and self._later[0].not_before <= now:
            work = self._later.pop(0)
            work.not_before = 0.0
            insort(self._works, work, key=_PLACE)

    def settle_down(self, begun: Iterable[Work]) -> None:
        """A batch has begun: what had aged was first once, and goes on where its list stands."""
        if self._aged:
            for work in chain(begun, self._works):
                work.place = work.claimed.rank, work.place[1]
            self._works.sort(key=_PLACE)
            self._aged = False

    def remove(self, works: Iterable[Work]) -> None:
        gone = {id(work) for work in works}
        self._works = [work for work in self._works if id(work) not in gone]
        if self._later:
            self._later = [work for work in self._later if id(work) not in gone]

    def clear(self) -> list[Work]:
        """Empty the buffer and return what it held, in order."""
        works, self._works, self._later = sorted(self, key=_PLACE), [], []
        return works

    def spare(self, model: str) -> int:
        """Return how many more inputs fit before the model's next batch is full; 0 or less when it is."""
        return self._limit(model) - sum(self._weight(work) for work in self._works if work.model == model)

    def surplus(self, max_bytes: int) -> list[Work]:
        """Return the tasks that come after the full batches of their model that are kept, none begun.

        And those beyond ``max_bytes`` of payload, but for the first.
        """
        left: dict[str, int] = {}
        beyond: list[Work] = []
        for work in self._works:
            room = left.setdefault(work.model, KEPT_BATCHES * self._limit(work.model))
            over = room <= 0 or (max_bytes <= 0 and work is not self._works[0])
            if over and not work.begun:
                beyond.append(work)
                continue
            left[work.model] = room - self._weight(work)
            max_bytes -= len(work.claimed.payload)
        return beyond

    def _weight(self, work: Work) -> int:
        return self._limit(work.model) if work.alone else len(work.inputs) - len(work.outcomes)

    def next_batch(self) -> Batch | None:
        """Return the next batch without removing it: the most urgent task and its fellows, in order.

        Fellows share its model and its time limits. A task that must run alone gets a batch to itself.
        """
        if not self._works:
            return None
        first = self._works[0]
        room = self._limit(first.model)
        parts: list[Part] = []
        for work in self._works:
            if room <= 0:
                break
            if work is not first and (first.alone or not _fellows(first, work)):
                continue
            start = len(work.outcomes)
            count = min(len(work.inputs) - start, room, work.slice_limit or room)
            parts.append(Part(work, start, start + count))
            room -= count
        soft_s, hard_s = first.soft_limit_s, first.hard_limit_s
        for part in parts:
            if part.work.total_s < math.inf:
                soft_s = min(soft_s, part.work.total_s - part.work.ran_s)
        return Batch(first.model, tuple(parts), soft_s, hard_s)


def _fellows(first: Work, other: Work) -> bool:
    return (
        other.model == first.model
        and not other.alone
        and other.soft_limit_s == first.soft_limit_s
        and other.hard_limit_s == first.hard_limit_s
    )
