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
from gpuinfer.queue.keys import place_of
from gpuinfer.queue.store import Claimed
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.engine import Done, RunAlone
from gpuinfer.worker.work import Work

log = get_logger(__name__)


def _batch(batch: Batch) -> dict[str, Any]:
    works = batch.works
    lists = {work.claimed.list_key for work in works}
    return {
        "model": batch.model,
        "batch_size": batch.size,
        "tasks": len(works),
        "queues": sorted({place_of(key).tier for key in lists}),
        "task_ids": [work.envelope.id for work in works],
    }


def _task(work: Work) -> dict[str, Any]:
    return {"task_id": work.id, "queue": place_of(work.claimed.list_key).tier, "model": work.model}


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


def handed_back(works: Sequence[Work]) -> None:
    """Tasks go back to their lists: other models' batches come first here, and other workers may be free."""
    log.debug("handed_back", tasks=len(works), task_ids=[work.id for work in works])


def taken_back(works: Sequence[Work], error: GpuinferError) -> None:
    """A reaper took this worker for dead while it was cut off: it drops what it held, and goes on."""
    log.warning("taken_back", tasks=len(works), task_ids=[work.id for work in works], reason=str(error))


def task_refused(task: Claimed, task_id: str, error: GpuinferError) -> None:
    """A message cannot be run as it is."""
    queue = place_of(task.list_key).tier
    _say(error)("task_refused", task_id=task_id, queue=queue, code=error.code, reason=str(error))


def task_skipped(work: Work) -> None:
    """A task was ended by somebody else: cancelled, or finished by an earlier delivery."""
    log.info("task_skipped", **_task(work), reason="its final state is written already")


def task_dropped(work: Work, error: GpuinferError) -> None:
    """A task has expired, was revoked, or has used up its time, before its next batch."""
    say = log.warning if isinstance(error, SoftTimeLimitExceeded) else log.info
    say("task_dropped", **_task(work), code=error.code, reason=str(error))


def task_retried(work: Work, pause_s: float, error: GpuinferError) -> None:
    """A task goes back to the buffer after a failure that may pass."""
    log.warning("task_retried", **_task(work), retry=work.retries, pause_s=pause_s, reason=str(error))


def task_failed(work: Work, error: GpuinferError) -> None:
    """A task has ended with an error."""
    _say(error)("task_failed", **_task(work), code=error.code, reason=str(error))


def _say(error: GpuinferError) -> Any:
    """Return the level: a caller's mistake is no trouble of this host's."""
    return log.info if isinstance(error, InputError) else log.warning
