# SPDX-License-Identifier: Apache-2.0
"""A model of workers in simulated time: they take a while to start, and serve in batches.

A batch of b tasks takes ``base + each * b``; a worker takes what waits, up to the model's limit, the
most urgent queue first. Time is counted in steps of the trace's grid.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

from gpuinfer.settings import QUEUES


@dataclass(frozen=True, kw_only=True)
class Model:
    """A worker: how long it takes to start, and what it serves."""

    #: Seconds from start to ready, and the share by which a start may differ from it.
    startup_s: float = 12.0
    startup_spread: float = 0.15
    #: Seconds for one task alone.
    single_s: float = 0.04
    max_batch: int = 32
    #: How many times more tasks a second a full batch serves than single ones.
    gain: float = 8.0

    def batch_s(self, tasks: int) -> float:
        """Return the seconds of a batch: ``single_s`` for one task, and so that a full batch has the gain."""
        if self.max_batch == 1:
            return self.single_s
        each = self.single_s * (self.max_batch / self.gain - 1) / (self.max_batch - 1)
        return self.single_s + each * (tasks - 1)

    @property
    def rate(self) -> float:
        """Return the tasks a second of one worker with full batches."""
        return self.max_batch / self.batch_s(self.max_batch)


@dataclass(slots=True)
class Log:
    """What happened: how long tasks waited, and the fleet at each probe."""

    #: Steps waited -> tasks.
    waits: Counter[int] = field(default_factory=Counter)
    #: (second, waiting, active, starting)
    probes: list[tuple[float, int, int, int]] = field(default_factory=list)
    starts: int = 0
    stops: int = 0


class Cluster:
    """The fleet and the queues at one moment. Instances are numbered from 0."""

    def __init__(self, gpus: int, model: Model, step_s: float, seed: int) -> None:
        self.gpus, self.model, self.step_s = gpus, model, step_s
        self.step = 0
        self.log = Log()
        self.waiting = [0] * len(QUEUES)
        #: For each queue, the oldest first: the step of arrival, and how many of those tasks wait.
        self._lines: tuple[deque[list[int]], ...] = tuple(deque() for _ in QUEUES)
        self.in_flight = [0] * len(QUEUES)
        self.done = [0] * len(QUEUES)
        #: Instance -> the step at which it began to start, or became ready; and how many end after a batch.
        self.starting: dict[int, int] = {}
        self.active: dict[int, int] = {}
        self.leaving = 0
        self.idle = 0
        #: Step -> what happens then.
        self._ready: dict[int, list[int]] = defaultdict(list)
        #: Instance -> the step at which its last start is done; an earlier one was stopped.
        self._due: dict[int, int] = {}
        self._finished: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        self._steps_of_batch = [max(1, round(model.batch_s(b) / step_s)) for b in range(model.max_batch + 1)]
        spread = np.random.default_rng(seed).uniform(-1, 1, size=4096) * model.startup_spread
        self._startups = np.maximum(1, np.rint(model.startup_s * (1 + spread) / step_s)).astype(int).tolist()
        self.gpu_steps = 0
        self.busy_steps = 0

    @property
    def now(self) -> float:
        """Return the simulated time in seconds."""
        return self.step * self.step_s

    @property
    def running(self) -> int:
        """Return how many workers serve or are about to."""
        return len(self.active) + len(self.starting)

    def runs(self, instance: int) -> bool:
        """Tell whether a worker serves or is about to."""
        return instance in self.active or instance in self.starting

    @property
    def busy(self) -> int:
        """Return how many active workers have a batch."""
        return len(self.active) - self.idle

    @property
    def served(self) -> bool:
        """Tell whether nothing waits and nothing is in flight."""
        return not self.total_waiting and not any(self.in_flight)

    @property
    def total_waiting(self) -> int:
        """Return how many tasks wait."""
        return sum(self.waiting)

    def move_to(self, step: int) -> None:
        """Let time pass until ``step``, which must not be beyond the next event."""
        passed = step - self.step
        self.gpu_steps += passed * (self.running + self.leaving)
        self.busy_steps += passed * (self.busy + self.leaving)
        self.step = step
        for workers, tasks in self._finished.pop(step, ()):
            gone = min(self.leaving, workers)
            self.leaving -= gone
            self.idle += workers - gone
            for place, count in enumerate(tasks):
                self.in_flight[place] -= count
                self.done[place] += count
        for instance in self._ready.pop(step, ()):
            if self._due.get(instance) == step and self.starting.pop(instance, None) is not None:
                self.active[instance] = step
                self.idle += 1

    def claim(self) -> None:
        """Let idle workers claim what waits: full batches, and one with the rest."""
        limit = self.model.max_batch
        total = self.waiting[0] + self.waiting[1] + self.waiting[2]
        while total and self.idle:
            full = min(self.idle, total // limit)
            workers, size = (full, limit) if full else (1, total)
            taken = self._take(workers * size)
            self.idle -= workers
            total -= workers * size
            end = self.step + self._steps_of_batch[size]
            self._finished[end].append((workers, taken))

    def arrive(self, place: int, tasks: int) -> None:
        """Add tasks to a queue."""
        self.waiting[place] += tasks
        self._lines[place].append([self.step, tasks])

    def oldest_s(self, place: int) -> float:
        """Return how long the longest-waiting task of a queue has waited."""
        line = self._lines[place]
        return (self.step - line[0][0]) * self.step_s if line else 0.0

    def _take(self, tasks: int) -> list[int]:
        taken = [0] * len(QUEUES)
        for place, waiting in enumerate(self.waiting):
            count = min(tasks, waiting)
            if count:
                taken[place] = count
                tasks -= count
                self.waiting[place] -= count
                self.in_flight[place] += count
                self._serve(place, count)
        return taken

    def _serve(self, place: int, tasks: int) -> None:
        """Note how long the oldest ``tasks`` of a queue have waited."""
        line, waits = self._lines[place], self.log.waits
        while tasks:
            first = line[0]
            count = min(tasks, first[1])
            waits[self.step - first[0]] += count
            first[1] -= count
            tasks -= count
            if not first[1]:
                line.popleft()

    def start(self, instance: int) -> None:
        """Begin to start an instance that does not run."""
        self.starting[instance] = self.step
        ready = self.step + self._startups[self.log.starts % len(self._startups)]
        self.log.starts += 1
        self._ready[ready].append(instance)
        self._due[instance] = ready

    def give_up(self) -> None:
        """Count the tasks that still wait at the end with the time they have waited."""
        for place, waiting in enumerate(self.waiting):
            self._serve(place, waiting)

    def stop(self, instance: int) -> None:
        """Stop an instance: at once when some worker is idle, else after its batch."""
        self.log.stops += 1
        if self.starting.pop(instance, None) is not None:
            return
        del self.active[instance]
        if self.idle:
            self.idle -= 1
        else:
            self.leaving += 1
