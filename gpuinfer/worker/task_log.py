# SPDX-License-Identifier: Apache-2.0
"""A worker's log lines about tasks. They contain task ids, so that ``gpuinfer logs`` can show one task's log.

At info each batch has one line, ``batch_done``, with the ids of its tasks; a long batch also has one line
``batch_running``. Above ``log.named_tasks`` tasks per second, each model has one line per second,
``batches_done``, without ids. Tasks that failed, were retried, redelivered or slow are always named, each in
its own line, or many of one batch with the same outcome in one line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gpuinfer.errors import GpuinferError, InputError, SoftTimeLimitExceeded
from gpuinfer.log import get_logger
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.keys import place_of
from gpuinfer.settings import LogSettings
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.engine import Done
from gpuinfer.worker.passes import RunAlone
from gpuinfer.worker.task import Task

log = get_logger(__name__)

Level = Literal["info", "warning"]

#: Averaging time of the task rate in seconds, so that a single large batch is still named.
RATE_S = 10.0
#: Seconds per summary line.
SUMMARY_S = 1.0
#: Maximum tasks with the same outcome that get a line each; more share one line.
ONE_BY_ONE = 3


class Rate:
    """Tasks per second, as an exponential average; capped, so that it falls quickly after a burst."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._rate, self._at = 0.0, -math.inf

    def _decayed(self, now: float) -> float:
        return self._rate * math.exp(-(now - self._at) / RATE_S)

    def fits(self, tasks: int, now: float) -> bool:
        """Whether ``tasks`` more stay within the limit. ``now`` is in seconds."""
        return self._decayed(now) + tasks / RATE_S <= self._limit

    def add(self, tasks: int, now: float) -> bool:
        """Count tasks; return whether they stay within the limit."""
        rate = self._decayed(now) + tasks / RATE_S
        self._rate, self._at = min(rate, 2 * self._limit), now
        return rate <= self._limit


@dataclass(slots=True)
class _Summary:
    """The batches of one model that were not logged individually."""

    since: float
    queues: set[str] = field(default_factory=set)
    batches: int = 0
    tasks: int = 0
    inputs: int = 0
    failed: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0


@dataclass(slots=True)
class _Fate:
    """Tasks with the same outcome, logged together."""

    level: Level
    fields: dict[str, Any]
    #: Id -> reason.
    tasks: list[tuple[str, str]] = field(default_factory=list)


class TaskLog:
    """The task log of one worker. Call ``tick`` a few times a second."""

    def __init__(self, settings: LogSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slow_s = settings.slow_s
        self._rate = Rate(settings.named_tasks)
        self._summaries: dict[str, _Summary] = {}
        self._fates: dict[tuple[object, ...], _Fate] = {}

    # -- batches --------------------------------------------------------------------------

    def batch_running(self, batch: Batch, device: str) -> None:
        """Log that a batch takes long."""
        if self._rate.fits(len(batch.parts), self._clock()):
            log.info("batch_running", **_batch(batch), device=device)

    def batch_done(self, done: Done, device: str) -> None:
        """Log a finished batch."""
        self.tell()
        failed = sum(isinstance(outcome, Exception) for outcome in done.outcomes)
        if failed and any(isinstance(outcome, RunAlone) for outcome in done.outcomes):
            self._too_slow(done.batch)
        now = self._clock()
        if self._rate.add(len(done.batch.parts), now):
            took = round(done.seconds * 1000, 2)
            log.info("batch_done", **_batch(done.batch), failed=failed, duration_ms=took, device=device)
            return
        self._name_odd(done, failed, device)
        self._sum_up(done, failed, now)
        self.tick(device)

    def _too_slow(self, batch: Batch) -> None:
        reason = f"the batch exceeded its soft time limit of {batch.soft_limit_s:g} s"
        hint = "each task runs again, alone" if batch.shared else "it runs again, in smaller slices"
        fields = _batch(batch) | {"limit_s": batch.soft_limit_s}
        log.warning("batch_too_slow", **fields, reason=reason, hint=hint)

    def _name_odd(self, done: Done, failed: int, device: str) -> None:
        """Log tasks of a batch that were redelivered, retried or slow; failed ones are logged already."""
        slow = done.seconds >= self._slow_s
        odd = [
            task.id
            for task in done.batch.tasks
            if slow or task.redelivered or task.retries or task.ran_s >= self._slow_s
        ]
        if odd:
            took = round(done.seconds * 1000, 2)
            fields = _batch(done.batch) | {"task_ids": odd, "named": len(odd)}
            log.info("batch_done", **fields, failed=failed, duration_ms=took, device=device)

    def _sum_up(self, done: Done, failed: int, now: float) -> None:
        batch = done.batch
        total = self._summaries.setdefault(batch.model, _Summary(now))
        total.queues.update(place_of(key).tier for key in {task.claimed.list_key for task in batch.tasks})
        total.batches += 1
        total.tasks += len(batch.parts)
        total.inputs += batch.size
        total.failed += failed
        total.seconds += done.seconds
        total.longest_s = max(total.longest_s, done.seconds)

    def tick(self, device: str, *, last: bool = False) -> None:
        """Write summaries that are a second old; with ``last``, all."""
        now = self._clock()
        for model, total in list(self._summaries.items()):
            if last or now - total.since >= SUMMARY_S:
                del self._summaries[model]
                log.info(
                    "batches_done",
                    model=model,
                    batches=total.batches,
                    tasks=total.tasks,
                    inputs=total.inputs,
                    queues=sorted(total.queues),
                    failed=total.failed,
                    duration_ms=round(total.seconds * 1000, 2),
                    longest_ms=round(total.longest_s * 1000, 2),
                    device=device,
                )

    # -- single tasks, grouped if many have the same outcome ------------------------------

    def task_refused(self, claimed: Claimed, task_id: str, error: GpuinferError) -> None:
        """Log a message that cannot be run."""
        fields = {"queue": place_of(claimed.list_key).tier, "code": error.code}
        self._note("task_refused", _level(error), task_id, str(error), fields)

    def task_dropped(self, task: Task, error: GpuinferError) -> None:
        """Log a task that expired, was revoked, or used up its time before its next batch."""
        level: Level = "warning" if isinstance(error, SoftTimeLimitExceeded) else "info"
        self._note("task_dropped", level, task.id, str(error), _task(task) | {"code": error.code})

    def task_retried(self, task: Task, pause_s: float, error: GpuinferError) -> None:
        """Log a task that returns to the buffer after a temporary failure."""
        fields = _task(task) | {"retry": task.retries, "pause_s": pause_s, "code": error.code}
        self._note("task_retried", "warning", task.id, str(error), fields)

    def task_failed(self, task: Task, error: GpuinferError) -> None:
        """Log a task that ended with an error."""
        self._note("task_failed", _level(error), task.id, str(error), _task(task) | {"code": error.code})

    def task_skipped(self, task: Task) -> None:
        """Log a task that had already ended: cancelled, or finished by an earlier delivery."""
        self._note("task_skipped", "info", task.id, "it has already ended", _task(task))

    def task_cancelled(self, task: Task) -> None:
        """Log a task that was cancelled while it ran."""
        reason = "cancelled while it ran; its result is dropped"
        self._note("task_cancelled", "info", task.id, reason, _task(task))

    def _note(self, action: str, level: Level, task_id: str, reason: str, fields: dict[str, Any]) -> None:
        key = (action, level, *fields.items())
        fate = self._fates.setdefault(key, _Fate(level, {"action": action, **fields}))
        fate.tasks.append((task_id, reason))

    def tell(self) -> None:
        """Write the lines about single tasks."""
        if not self._fates:
            return
        fates, self._fates = self._fates, {}
        for fate in fates.values():
            fields = dict(fate.fields)
            action = fields.pop("action")
            say = log.warning if fate.level == "warning" else log.info
            if len(fate.tasks) <= ONE_BY_ONE:
                for task_id, reason in fate.tasks:
                    say(action, task_id=task_id, **fields, reason=reason)
                continue
            reason, *others = dict.fromkeys(reason for _, reason in fate.tasks)
            if others:
                reason += f" (and {len(others)} other reasons; see the tasks' results)"
            ids = [task_id for task_id, _ in fate.tasks]
            say(action, tasks=len(ids), task_ids=ids, **fields, reason=reason)


#: Maximum trace ids in one line about a batch.
_MOST_TRACES = 100


def _batch(batch: Batch) -> dict[str, Any]:
    tasks = batch.tasks
    lists = {task.claimed.list_key for task in tasks}
    traces = sorted({found for task in tasks if (found := task.envelope.traceparent)})
    return {
        "model": batch.model,
        "batch_size": batch.size,
        **({"traceparents": traces[:_MOST_TRACES]} if traces else {}),
        "tasks": len(tasks),
        "queues": sorted({place_of(key).tier for key in lists}),
        "task_ids": [task.envelope.id for task in tasks],
    }


def _task(task: Task) -> dict[str, Any]:
    found = {"queue": place_of(task.claimed.list_key).tier, "model": task.model}
    return found | {"traceparent": trace} if (trace := task.envelope.traceparent) else found


def _level(error: GpuinferError) -> Level:
    """Return the log level: info for a client's mistake."""
    return "info" if isinstance(error, InputError) else "warning"


def batch_begun(batch: Batch) -> None:
    """Log at debug that a batch goes to the device."""
    log.debug("batch_begun", **_batch(batch))


def batch_withdrawn(batch: Batch, tasks: Sequence[Task]) -> None:
    """Log that a batch was withdrawn for a more urgent or larger one; ``tasks``: those not begun."""
    log.debug("batch_withdrawn", model=batch.model, task_ids=[task.id for task in tasks])


def batch_lost(done: Done) -> None:
    """Log that the device failed during a batch; the process exits, and its tasks return to the queue."""
    log.error("batch_lost", **_batch(done.batch), reason=str(done.fatal))


def device_lost(error: GpuinferError, device: str) -> None:
    """Log that the device failed while idle; the process exits, and no task is charged."""
    log.error("device_lost", device=device, reason=str(error))


def handed_back(tasks: Sequence[Task], unread: int = 0) -> None:
    """Log tasks returned to the queue: other models run first here, and other workers may be idle."""
    log.debug("handed_back", tasks=len(tasks) + unread, task_ids=[task.id for task in tasks])


def taken_back(tasks: Sequence[Task], error: GpuinferError) -> None:
    """Log that a reaper declared this worker dead while disconnected; it drops its tasks and continues."""
    log.warning("taken_back", tasks=len(tasks), task_ids=[task.id for task in tasks], reason=str(error))
