# SPDX-License-Identifier: Apache-2.0
"""The claimed tasks that have not run yet, in serving order, and the choice of batches. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import frexp, inf
from operator import attrgetter
from typing import NamedTuple

from gpuinfer.worker.task import Task


class Part(NamedTuple):
    """The inputs ``start`` to ``stop`` of one task, in a batch."""

    task: Task
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one forward pass: parts for one model, under the smallest of their time limits."""

    model: str
    parts: tuple[Part, ...]
    soft_limit_s: float
    hard_limit_s: float

    @property
    def size(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    @property
    def shared(self) -> bool:
        """True when several tasks run together."""
        return len(self.parts) > 1

    @property
    def tasks(self) -> list[Task]:
        return [part.task for part in self.parts]


_PLACE, _TIME = attrgetter("place"), attrgetter("not_before")
#: Rank of a task from an aged list, until a batch has begun.
AGED = -1
#: Maximum full batches of a model to keep; tasks beyond are returned to the queue.
KEPT_BATCHES = 2


class Buffer:
    """Claimed tasks that wait for the device or for a retry.

    ``limit`` gives a model's largest batch.
    """

    def __init__(self, limit: Callable[[str], int]) -> None:
        #: Tasks that can run now, in serving order; and tasks that wait for a time, by that time.
        self._tasks: list[Task] = []
        self._later: list[Task] = []
        self._limit = limit
        self._arrivals = 0
        self._aged = False

    def __len__(self) -> int:
        return len(self._tasks) + len(self._later)

    def __iter__(self) -> Iterator[Task]:
        return chain(self._tasks, self._later)

    @property
    def size(self) -> int:
        """Bytes of their arguments, as text."""
        return sum(task.size for task in self)

    @property
    def ready(self) -> Sequence[Task]:
        """Tasks that wait only for the device, in serving order."""
        return self._tasks

    def add(self, task: Task) -> None:
        """Insert a task: after its equals if new, before them if it comes back."""
        self._enter(task)
        if task.not_before:
            insort(self._later, task, key=_TIME)
        else:
            insort(self._tasks, task, key=_PLACE)

    def add_all(self, tasks: Iterable[Task]) -> None:
        """Insert new tasks; much cheaper than one by one."""
        for task in tasks:
            self._enter(task)
            (self._later if task.not_before else self._tasks).append(task)
        self._tasks.sort(key=_PLACE)
        self._later.sort(key=_TIME)

    def _enter(self, task: Task) -> None:
        soft_s, hard_s, total_s = task.soft_limit_s, task.hard_limit_s, task.total_s
        if total_s != inf:
            soft_s = min(soft_s, total_s - task.ran_s)
        task.soft_left_s = soft_s
        task.kind = task.model, frexp(soft_s)[1], frexp(hard_s)[1]
        if not task.place[1]:
            self._arrivals += 1
            task.place = AGED if task.claimed.aged else task.claimed.rank, self._arrivals
            self._aged |= task.claimed.aged

    def wake(self, now: float) -> None:
        """Make tasks ready whose time has come; ``now`` is monotonic."""
        while self._later and self._later[0].not_before <= now:
            task = self._later.pop(0)
            task.not_before = 0.0
            insort(self._tasks, task, key=_PLACE)

    def end_ageing(self, begun: Iterable[Task]) -> None:
        """After a batch has begun, give aged tasks their normal rank again."""
        if self._aged:
            for task in chain(begun, self._tasks):
                task.place = task.claimed.rank, task.place[1]
            self._tasks.sort(key=_PLACE)
            self._aged = False

    def remove(self, tasks: Iterable[Task]) -> None:
        gone = {id(task) for task in tasks}
        self._tasks = [task for task in self._tasks if id(task) not in gone]
        if self._later:
            self._later = [task for task in self._later if id(task) not in gone]

    def clear(self) -> list[Task]:
        """Empty the buffer and return what it held, in order."""
        tasks, self._tasks, self._later = sorted(self, key=_PLACE), [], []
        return tasks

    def spare(self, model: str) -> int:
        """Return how many more inputs the model's next batch can take; 0 or less if it is full."""
        return self._limit(model) - sum(self._weight(task) for task in self._tasks if task.model == model)

    def surplus(self, max_bytes: int) -> list[Task]:
        """Return the tasks to hand back: not begun, and beyond the full batches to keep of their model.

        Also those beyond ``max_bytes`` of arguments, except the first.
        """
        left: dict[str, int] = {}
        beyond: list[Task] = []
        for task in self._tasks:
            room = left.setdefault(task.model, KEPT_BATCHES * self._limit(task.model))
            over = room <= 0 or (max_bytes <= 0 and task is not self._tasks[0])
            if over and not task.begun:
                beyond.append(task)
                continue
            left[task.model] = room - self._weight(task)
            max_bytes -= task.size
        return beyond

    def _weight(self, task: Task) -> int:
        return self._limit(task.model) if task.alone else len(task.inputs) - len(task.outcomes)

    def next_batch(self) -> Batch | None:
        """Return the next batch without removing it: the most urgent task, and others that fit, in order.

        The others have the same model and similar time limits (between the same two powers of two). The pass
        gets the smallest limit, so that no task exceeds its own. A pass that is too slow fails a task only if
        it ran alone. A task that must run alone gets its own batch.
        """
        if not self._tasks:
            return None
        first = self._tasks[0]
        room = self._limit(first.model)
        parts: list[Part] = []
        for task in self._tasks:
            if room <= 0:
                break
            if task is not first and (first.alone or task.alone or task.kind != first.kind):
                continue
            start = len(task.outcomes)
            count = min(len(task.inputs) - start, room, task.slice_limit or room)
            parts.append(Part(task, start, start + count))
            room -= count
        soft_s = min(part.task.soft_left_s for part in parts)
        hard_s = min(part.task.hard_limit_s for part in parts)
        return Batch(first.model, tuple(parts), soft_s, hard_s)
