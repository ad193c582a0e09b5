# SPDX-License-Identifier: Apache-2.0
"""Assigns a batch's outcomes to its tasks: each task ends, is retried, or continues with its next inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gpuinfer.errors import GpuinferError, ResultTooLarge, SoftTimeLimitExceeded, TaskRevoked
from gpuinfer.queue.claims import Final
from gpuinfer.settings import QueueSettings
from gpuinfer.worker.accounting import Accounts
from gpuinfer.worker.engine import Done
from gpuinfer.worker.holdings import Holdings
from gpuinfer.worker.passes import RunAlone
from gpuinfer.worker.task import Task, conclude


class Outcomes:
    """Ends a batch's tasks, or puts them back into the buffer. For the main thread of one worker."""

    def __init__(
        self,
        holdings: Holdings,
        settings: QueueSettings,
        accounts: Accounts,
        device: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._held = holdings
        self._buffer = holdings.buffer
        self._settings = settings
        self._accounts = accounts
        self._device = device
        self._clock = clock
        self._wall = wall

    def distribute(self, done: Done) -> list[Final]:
        """Assign a batch's outcomes to its tasks; return the final states of those that are complete."""
        held, finals, position = self._held, [], 0
        shared, size, now = done.batch.shared, done.batch.size, self._wall()
        rerun = RunAlone in set(map(type, done.outcomes))
        for part in done.batch.parts:
            task, count = part.task, part.stop - part.start
            mine = done.outcomes[position : position + count]
            position += count
            again = rerun and any(isinstance(outcome, RunAlone) for outcome in mine)
            if not (again and shared):  # if so, another task may have used that time
                task.ran_s += done.seconds
            task.batch_size = max(task.batch_size, size)
            final = self._advance(task, mine, None if shared else count, again=again)
            if final is None and task.seq in held.taken_back:  # its other inputs run where it is claimed next
                self._buffer.remove([task])
                held.celery.finished(task, None)
                held.dropped.add(task.seq)
                held.store.mark_uncertain()  # a reaper that was interrupted has not put it back
            if final is not None:
                finals.append(final)
                self._accounts.ended(task, now)
        held.taken_back -= {task.seq for task in done.batch.tasks}
        return finals

    def _advance(self, task: Task, outcomes: list[Any], alone: int | None, *, again: bool) -> Final | None:
        """Add a task's outcomes. Returns its final state, or None if it goes back to the buffer.

        ``alone``: the batch's size, if it had only this task; ``again``: the batch passed its soft limit, so
        the task must run alone.
        """
        held = self._held
        if task.ended:
            held.celery.finished(task, TaskRevoked("it was cancelled"))
            return held.outbox.skipped(task)
        if again:
            task.alone = True
            task.slice_limit = max(1, alone // 2) if alone else None
            self._buffer.add(task)
            return None
        passing = None
        for outcome in outcomes:
            if isinstance(outcome, GpuinferError) and outcome.transient:
                passing = outcome
                break
        if passing is not None and task.retries < self._settings.max_retries:
            pause = self._settings.retry_backoff_s * 2**task.retries
            task.retries += 1
            task.not_before = self._clock() + pause
            self._buffer.add(task)
            held.lines.task_retried(task, pause, passing)
            return None
        task.outcomes += outcomes
        if task.left:
            self._buffer.add(task)
            return None
        end = conclude(task, self._device)
        if isinstance(end, SoftTimeLimitExceeded) and task.ran_s >= task.total_s:
            end = task.out_of_time()
        try:
            final = held.outbox.final(task.claimed, end, task.envelope, task)
        except ResultTooLarge as exc:
            end, final = exc, held.outbox.final(task.claimed, exc, task.envelope, task)
        error = end if isinstance(end, GpuinferError) else None
        held.celery.finished(task, error, end)
        if error is not None:
            held.lines.task_failed(task, error)
        return final
