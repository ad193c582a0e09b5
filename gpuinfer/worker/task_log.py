# SPDX-License-Identifier: Apache-2.0
"""What a worker's log tells of tasks: each line names them, so that one task's story can be asked for.

At info a batch is one line, ``batch_done``, with the ids of all its tasks; a batch that takes its
time says so once, ``batch_running``. What happens to a single task has a line of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuinfer.errors import GpuinferError, InputError, SoftTimeLimitExceeded
from gpuinfer.log import get_logger
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.keys import place_of
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.engine import Done
from gpuinfer.worker.passes import RunAlone
from gpuinfer.worker.task import Task

log = get_logger(__name__)


def _batch(batch: Batch) -> dict[str, Any]:
    tasks = batch.tasks
    lists = {task.claimed.list_key for task in tasks}
    return {
        "model": batch.model,
        "batch_size": batch.size,
        "tasks": len(tasks),
        "queues": sorted({place_of(key).tier for key in lists}),
        "task_ids": [task.envelope.id for task in tasks],
    }


def _task(task: Task) -> dict[str, Any]:
    return {"task_id": task.id, "queue": place_of(task.claimed.list_key).tier, "model": task.model}


def batch_begun(batch: Batch) -> None:
    """A batch goes to the device; at debug, as most have ended before anybody looks."""
    log.debug("batch_begun", **_batch(batch))


def batch_running(batch: Batch, device: str) -> None:
    """A batch takes its time."""
    log.info("batch_running", **_batch(batch), device=device)


def batch_done(done: Done, device: str) -> None:
    """A batch has run, and its ends are written or wait to be."""
    fields = _batch(done.batch)
    failures = [outcome for outcome in done.outcomes if isinstance(outcome, Exception)]
    if any(isinstance(failure, RunAlone) for failure in failures):
        reason = "it passed its soft time limit as a whole"
        hint = "each task runs again, alone" if fields["tasks"] > 1 else "it runs again, in smaller slices"
        log.warning("batch_too_slow", **fields, reason=reason, hint=hint)
    took = round(done.seconds * 1000, 2)
    log.info("batch_done", **fields, failed=len(failures), duration_ms=took, device=device)


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


def task_refused(claimed: Claimed, task_id: str, error: GpuinferError) -> None:
    """A message cannot be run as it is."""
    queue = place_of(claimed.list_key).tier
    _say(error)("task_refused", task_id=task_id, queue=queue, code=error.code, reason=str(error))


def task_skipped(task: Task) -> None:
    """A task was ended by somebody else: cancelled, or finished by an earlier delivery."""
    log.info("task_skipped", **_task(task), reason="its final state is written already")


def task_cancelled(task: Task) -> None:
    """A task was ended by somebody else while it ran."""
    log.info("task_cancelled", **_task(task), reason="cancelled while it ran: what comes of it is dropped")


def task_dropped(task: Task, error: GpuinferError) -> None:
    """A task has expired, was revoked, or has used up its time, before its next batch."""
    say = log.warning if isinstance(error, SoftTimeLimitExceeded) else log.info
    say("task_dropped", **_task(task), code=error.code, reason=str(error))


def task_retried(task: Task, pause_s: float, error: GpuinferError) -> None:
    """A task goes back to the buffer after a failure that may pass."""
    log.warning("task_retried", **_task(task), retry=task.retries, pause_s=pause_s, reason=str(error))


def task_failed(task: Task, error: GpuinferError) -> None:
    """A task has ended with an error."""
    _say(error)("task_failed", **_task(task), code=error.code, reason=str(error))


def _say(error: GpuinferError) -> Any:
    """Return the level: a caller's mistake is no trouble of this host's."""
    return log.info if isinstance(error, InputError) else log.warning
