# SPDX-License-Identifier: Apache-2.0
"""Submits batches to the engine: one when the device is idle, and the next one, to be prepared meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from gpuinfer.errors import GpuinferError, TaskExpired, TaskRevoked
from gpuinfer.queue.sink import TaskChannel
from gpuinfer.worker import task_log
from gpuinfer.worker.buffer import AGED, Batch
from gpuinfer.worker.claiming import Claiming
from gpuinfer.worker.holdings import Holdings
from gpuinfer.worker.pace import Pace
from gpuinfer.worker.task import Task


class Feeder:
    """Begins batches for one worker. While the device is idle, a batch never waits for more tasks."""

    def __init__(
        self,
        holdings: Holdings,
        claiming: Claiming,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._held = holdings
        self._engine = holdings.engine
        self._buffer = holdings.buffer
        self._claiming = claiming
        self._pace = pace
        self._clock = clock
        self._wall = wall
        #: Whether the batch that was submitted last goes first because its list was passed over for too long.
        self._ahead_aged = False

    def pump(self, channel: TaskChannel | None) -> None:
        """Submit batches: one when the inference thread is idle, and the next one, to be prepared."""
        while not self._engine.probing and not self._held.closed:
            if self._engine.current is not None and not self._has_room():
                return
            if self._held.intake.waiting:
                self._claiming.read(channel)
            self._buffer.wake(self._clock())
            self.drop_stale(self._buffer.ready)
            batch = self._buffer.next_batch()
            if batch is None or not self._may_start(batch) or not self._start(batch):
                return

    def _has_room(self) -> bool:
        """Tell whether a batch may be submitted behind the running one; make room for a better one.

        The waiting batch goes back to the buffer if a more urgent task has come, or if it can grow. Its
        prepared inputs are kept.
        """
        ahead, first = self._engine.ahead, next(iter(self._buffer.ready), None)
        if first is None or _suspect(self._engine.batches):
            return False
        if ahead is None:
            return self._engine.has_room
        if self._ahead_aged:  # must not be overtaken again
            return False
        urgent = first.place < ahead.tasks[0].place
        grows = first.model == ahead.model and ahead.size < self._engine.limit(ahead.model)
        grows = grows and first.kind == ahead.tasks[0].kind and not (first.alone or ahead.tasks[0].alone)
        return (urgent or grows) and self._held.withdraw()

    def _may_start(self, batch: Batch) -> bool:
        """Tell whether a batch may be submitted now. A task that was in a crash runs alone."""
        if _suspect([batch]):
            return not self._engine.chargeable
        return self._engine.takes(batch)

    def _start(self, batch: Batch) -> bool:
        """Begin a batch. Returns False when Redis is away, or it must wait: the batch stays in the buffer."""
        held = self._held
        ended = held.outbox.begin(batch, self._engine.chargeable)
        if ended is None:
            return False
        if ended:  # cancelled, or finished by an earlier delivery
            self._skip([batch.tasks[i] for i in sorted(ended)])
            return True
        if self._engine.current is not None and not self._engine.takes(batch):
            return False  # no longer allowed: the model's largest batch may have changed meanwhile
        tasks = batch.tasks
        self._ahead_aged = tasks[0].place[0] == AGED
        self._buffer.remove(tasks)
        self._buffer.end_ageing(tasks)
        now = self._wall()
        for task in tasks:
            if task.time_start is None:
                task.time_start = now
                held.celery.started(task)
        self._engine.submit(batch)
        self._pace.watch()
        if held.debug:
            task_log.batch_begun(batch)
        return True

    def _skip(self, tasks: list[Task]) -> None:
        """Drop tasks that have a final state already."""
        held = self._held
        self._buffer.remove(tasks)
        for task in tasks:
            # A redelivered task may have been finished by an earlier delivery.
            cancelled = task.begun or not task.redelivered
            held.celery.finished(task, TaskRevoked("it was cancelled") if cancelled else None)
            held.lines.task_skipped(task)
        held.lines.tell()
        held.settle([held.outbox.skipped(task) for task in tasks])

    def drop_stale(self, tasks: Iterable[Task]) -> None:
        """End tasks that have expired, were revoked, or have used up their time."""
        held, now, finals, dropped = self._held, self._wall(), [], []
        for task in tasks:
            error: GpuinferError | None = None
            if task.expires_at is not None and task.expires_at <= now and not task.begun:
                error = TaskExpired("its deadline passed before a worker could begin it")
            elif task.ran_s >= task.total_s:
                error = task.out_of_time()
            elif not task.begun and held.celery.revoked(task.id):
                error = TaskRevoked("it was revoked before a worker began it")
            if error is not None:
                dropped.append(task)
                finals.append(held.outbox.final(task.claimed, error, task.envelope, task))
                held.celery.finished(task, error)
                held.lines.task_dropped(task, error)
        if dropped:
            held.lines.tell()
            self._buffer.remove(dropped)
            held.settle(finals)


def _suspect(batches: Iterable[Batch]) -> bool:
    return any(task.envelope.deaths for batch in batches for task in batch.tasks)
