# SPDX-License-Identifier: Apache-2.0
"""Forward passes: as few as fit the device. A pass that fails is halved until the failing item is alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpuinfer.errors import DeviceOutOfMemory, InferenceError, SoftTimeLimitExceeded
from gpuinfer.models.context import Work, working
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.sizes import Sizes
from gpuinfer.worker.task import Task


class RunAlone(Exception):
    """The outcome of an input whose batch exceeded its soft limit as a whole: its task must run alone.

    It runs later, as more urgent tasks may go first.
    """


@dataclass(frozen=True, slots=True)
class _Ran:
    """The outcomes of some items of a batch."""

    outcomes: list[Any]
    #: True when the device had too little memory for them at once.
    memory: bool = False
    #: The largest number of items that fits the device, if that was found out.
    fits: int | None = None


@dataclass(slots=True)
class Limits:
    """When a batch must have ended, on the monotonic clock. Its halves share its time."""

    soft_at: float
    hard_at: float
    #: Whether the batch has inputs of several tasks.
    shared: bool

    @classmethod
    def of(cls, batch: Batch) -> Limits:
        """Start the batch's limits now."""
        now = time.monotonic()
        return cls(now + batch.soft_limit_s, now + batch.hard_limit_s, batch.shared)

    def left(self) -> tuple[float, float]:
        """Return the seconds left until the soft and the hard limit, at least 0.001."""
        now = time.monotonic()
        return max(0.001, self.soft_at - now), max(0.001, self.hard_at - now)


class Passes:
    """Runs the items of one batch through its model. For the device thread."""

    def __init__(
        self,
        model: LoadedModel,
        batch: Batch,
        work: Callable[[Sequence[Task]], Work],
        deadline: Deadline,
        sizes: Sizes,
        began: Callable[[], None],
    ) -> None:
        self._model = model
        self._tasks = batch.tasks
        self._until = Limits.of(batch)
        self._work = work
        self._deadline = deadline
        self._sizes = sizes
        self._began = began

    def waited(self, seconds: float) -> None:
        """Extend the limits by the seconds that the device waited for inputs to be prepared."""
        self._until.soft_at += seconds
        self._until.hard_at += seconds

    def run(self, items: Sequence[Any], tasks: Sequence[Task]) -> list[Any]:
        """Run items in as few passes as fit; return one outcome for each. ``tasks``: the task of each item.

        Raises DeviceError when the device cannot go on.
        """
        outcomes: list[Any] = []
        name = self._model.name
        while len(outcomes) < len(items):
            first, until = len(outcomes), len(outcomes) + self._sizes.limit(name)
            whole = first == 0 and until >= len(items)
            some = items if whole else items[first:until]  # a slice of staged items is not staged
            ran = self._halve(some, tasks[first:until])
            outcomes += ran.outcomes
            if ran.fits is not None and len(some) > 2:  # of two, one item may just be unusually large
                self._sizes.shrink(name, ran.fits)
            elif not ran.memory:
                self._sizes.passed(name, len(some))
        return outcomes

    def _halve(self, items: Sequence[Any], tasks: Sequence[Task]) -> _Ran:
        """Run items in one pass; a pass that fails is halved until the failing item is alone."""
        memory = False
        self._began()
        try:
            return _Ran(self._deadline.run(*self._until.left(), self._pass(items, tasks), self._tasks))
        except SoftTimeLimitExceeded as exc:
            alone = len(items) == 1 and not self._until.shared  # otherwise another's time or limit
            return _Ran([exc] if alone else [RunAlone()] * len(items))
        except DeviceOutOfMemory as exc:
            self._model.release_cache()
            memory = True
            if len(items) == 1:
                return _Ran([exc], memory=True)
        except InferenceError as exc:
            if len(items) == 1:
                return _Ran([exc])
        half = len(items) // 2
        first = self._halve(items[:half], tasks[:half])
        second = self._halve(items[half:], tasks[half:])
        fits = min((ran.fits for ran in (first, second) if ran.fits is not None), default=None)
        if memory and not first.memory and not second.memory:
            fits = half
        elif memory and not (first.fits and second.fits):  # it was one large item, not their number
            fits = None
        return _Ran(first.outcomes + second.outcomes, memory or first.memory or second.memory, fits)

    def _pass(self, items: Sequence[Any], tasks: Sequence[Task]) -> Callable[[], list[Any]]:
        """Return the call of one pass. Only a model with its own code gets the context of its tasks."""
        model = self._model
        if not model.runs_code:
            return lambda: list(model.launch(items))

        def call() -> list[Any]:
            with working(self._work(tasks)):
                return list(model.launch(items))

        return call
