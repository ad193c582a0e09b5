# SPDX-License-Identifier: Apache-2.0
"""What a worker's log tells of tasks: each line names them, so that one task's story can be asked for.

At info a batch is one line, ``batch_done``, with the ids of all its tasks; a batch that takes its
time says so once, ``batch_running``. That is so up to ``log.named_tasks`` tasks a second. Above, each model
has one line a second, ``batches_done``; tasks that failed, were retried, came again or were slow are named at
any rate: each in a line of its own, or many of one batch that share a fate in one line.
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

#: Seconds over which the rate of tasks is averaged: a batch of hundreds in a quiet hour names them all.
RATE_S = 10.0
#: Seconds that one summary covers.
SUMMARY_S = 1.0
#: The most tasks with the same end that have a line each; more are one line, which names all.
ONE_BY_ONE = 3


class Rate:
    """Tasks a second, an exponential average; capped, so that it is low again soon after a burst."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._rate, self._at = 0.0, -math.inf

    def _decayed(self, now: float) -> float:
        return self._rate * math.exp(-(now - self._at) / RATE_S)

    def fits(self, tasks: int, now: float) -> bool:
        """Tell whether ``tasks`` more stay within the limit. ``now`` is in seconds."""
        return self._decayed(now) + tasks / RATE_S <= self._limit

    def add(self, tasks: int, now: float) -> bool:
        """Count tasks, and tell whether they stay within the limit."""
        rate = self._decayed(now) + tasks / RATE_S
        self._rate, self._at = min(rate, 2 * self._limit), now
        return rate <= self._limit


@dataclass(slots=True)
class _Summary:
    """The batches of one model that no line has named."""

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
    """Tasks of which the same is told."""

    level: Level
    fields: dict[str, Any]
    #: Ids with the reason of each.
    tasks: list[tuple[str, str]] = field(default_factory=list)


class TaskLog:
    """The lines of one worker about its tasks. ``tick`` is to be called a few times a second."""

    def __init__(self, settings: LogSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slow_s = settings.slow_s
        self._rate = Rate(settings.named_tasks)
        self._summaries: dict[str, _Summary] = {}
        self._fates: dict[tuple[object, ...], _Fate] = {}

    # -- batches --------------------------------------------------------------------------

    def batch_running(self, batch: Batch, device: str) -> None:
        """A batch takes its time."""
        if self._rate.fits(len(batch.parts), self._clock()):
            log.info("batch_running", **_batch(batch), device=device)

    def batch_done(self, done: Done, device: str) -> None:
        """A batch has run, and its ends are written or wait to be."""
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
        reason = f"it passed its soft time limit of {batch.soft_limit_s:g} s as a whole"
        hint = "each task runs again, alone" if batch.shared else "it runs again, in smaller slices"
        fields = _batch(batch) | {"limit_s": batch.soft_limit_s}
        log.warning("batch_too_slow", **fields, reason=reason, hint=hint)

    def _name_odd(self, done: Done, failed: int, device: str) -> None:
        """Name those of a batch that came again, were retried or slow; what has failed has been named."""
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
        """Write the summaries that are a second old; the ``last`` time, all of them."""
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

    # -- single tasks, told together where many share a fate ------------------------------

    def task_refused(self, claimed: Claimed, task_id: str, error: GpuinferError) -> None:
        """A message cannot be run as it is."""
        fields = {"queue": place_of(claimed.list_key).tier, "code": error.code}
        self._note("task_refused", _level(error), task_id, str(error), fields)

    def task_dropped(self, task: Task, error: GpuinferError) -> None:
        """A task has expired, was revoked, or has used up its time, before its next batch."""
        level: Level = "warning" if isinstance(error, SoftTimeLimitExceeded) else "info"
        self._note("task_dropped", level, task.id, str(error), _task(task) | {"code": error.code})

    def task_retried(self, task: Task, pause_s: float, error: GpuinferError) -> None:
        """A task goes back to the buffer after a failure that may pass."""
        fields = _task(task) | {"retry": task.retries, "pause_s": pause_s, "code": error.code}
        self._note("task_retried", "warning", task.id, str(error), fields)

    def task_failed(self, task: Task, error: GpuinferError) -> None:
        """A task has ended with an error."""
        self._note("task_failed", _level(error), task.id, str(error), _task(task) | {"code": error.code})

    def task_skipped(self, task: Task) -> None:
        """A task was ended by somebody else: cancelled, or finished by an earlier delivery."""
        self._note("task_skipped", "info", task.id, "its final state is written already", _task(task))

    def task_cancelled(self, task: Task) -> None:
        """A task was ended by somebody else while it ran."""
        reason = "cancelled while it ran: what comes of it is dropped"
        self._note("task_cancelled", "info", task.id, reason, _task(task))

    def _note(self, action: str, level: Level, task_id: str, reason: str, fields: dict[str, Any]) -> None:
        key = (action, level, *fields.items())
        fate = self._fates.setdefault(key, _Fate(level, {"action": action, **fields}))
        fate.tasks.append((task_id, reason))

    def tell(self) -> None:
        """Write what was noted of single tasks."""
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
                reason += f" (and {len(others)} other reasons; each is in its task's result)"
            ids = [task_id for task_id, _ in fate.tasks]
            say(action, tasks=len(ids), task_ids=ids, **fields, reason=reason)


#: Traces that one line about a batch names.
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
    """Return the level: a caller's mistake is no trouble of this host's."""
    return "info" if isinstance(error, InputError) else "warning"


def batch_begun(batch: Batch) -> None:
    """A batch goes to the device; at debug, as most have ended before anybody looks."""
    log.debug("batch_begun", **_batch(batch))


def batch_withdrawn(batch: Batch, tasks: Sequence[Task]) -> None:
    """A batch goes back behind a better one; ``tasks``: those of it of which nothing has run."""
    log.debug("batch_withdrawn", model=batch.model, task_ids=[task.id for task in tasks])


def batch_lost(done: Done) -> None:
    """The device failed under a batch: the process ends, and its tasks are put back."""
    log.error("batch_lost", **_batch(done.batch), reason=str(done.fatal))


def device_lost(error: GpuinferError, device: str) -> None:
    """The device failed while no batch ran: the process ends, and no task has a share in it."""
    log.error("device_lost", device=device, reason=str(error))


def handed_back(tasks: Sequence[Task], unread: int = 0) -> None:
    """Tasks go back to their lists: other models' batches come first here, and other workers may be free."""
    log.debug("handed_back", tasks=len(tasks) + unread, task_ids=[task.id for task in tasks])


def taken_back(tasks: Sequence[Task], error: GpuinferError) -> None:
    """A reaper took this worker for dead while it was cut off: it drops what it held, and goes on."""
    log.warning("taken_back", tasks=len(tasks), task_ids=[task.id for task in tasks], reason=str(error))
