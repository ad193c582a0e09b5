# SPDX-License-Identifier: Apache-2.0
"""Writes the states of a worker's tasks to Redis: which batches run, and how tasks ended.

The record of running batches says which tasks a crash is charged to. A batch is put on record before it
begins. If an idle worker claims a single task, the claim itself puts it on record, as that task runs next.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from gpuinfer.errors import (
    GpuinferError,
    ResultTooLarge,
    TakenBack,
    TaskExpired,
    TaskRevoked,
    UnusableRedis,
    WorkerRunning,
)
from gpuinfer.log import get_logger
from gpuinfer.queue import binary, results
from gpuinfer.queue.claims import Claimed, Final, label, size_of
from gpuinfer.queue.connection import AWAY
from gpuinfer.queue.keys import RESULT_PREFIX, place_of
from gpuinfer.queue.message import Envelope
from gpuinfer.queue.options import BINARY
from gpuinfer.queue.store import Store
from gpuinfer.worker.about import about
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.task import Task

log = get_logger(__name__)

#: A task that has run for this many seconds is marked as started; for shorter ones the write is not worth it.
STARTED_AFTER_S = 0.1
#: Seconds between two writes of the progress of running tasks.
PROGRESS_EVERY_S = 1.0
#: One call writes at most this many final states, and bytes, as Redis serves nobody else meanwhile.
CHUNK_TASKS, CHUNK_BYTES = 1000, 4 * 1024 * 1024
#: A final state is given up after Redis has refused it alone this many times in a row, but answered a ping.
CULPRIT_TRIES = 3
#: A final state of this size is never too large for Redis: proto-max-bulk-len is at least 1 MiB.
SMALL_BYTES = 64 * 1024


class Outbox:
    """Writes states through the store; final states wait here while Redis is away."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._max_bytes = store.max_result_bytes
        #: Most final states in the next chunk; how often in a row a single one was refused.
        self._most, self._alone = CHUNK_TASKS, 0
        self._waiting: list[Final] = []
        #: The task that the last claim put on record, until the record is written again.
        self._noted: Claimed | None = None
        #: Whether the record is known to be empty.
        self._noted_idle = True
        #: Whether it was logged that Redis refuses.
        self._refused = False
        #: The wall clock when states of running tasks were last written.
        self._progress_at = 0.0

    @property
    def unsettled(self) -> Sequence[Final]:
        """Final states that are not written yet."""
        return self._waiting

    def held(self) -> set[int]:
        """Return the seqs of the tasks whose final states are not written yet."""
        return {final.seq for final in self._waiting if final.seq is not None}

    def claimed(self, claims: Sequence[Claimed]) -> None:
        """Remember which task the claim put on record."""
        self._noted = next((one for one in claims if one.noted_id is not None), None)
        if self._noted is not None:
            self._noted_idle = False

    def begin(self, batch: Batch, beside: Sequence[Batch] = ()) -> set[int] | None:
        """Put a batch on record, in addition to those that run (``beside``).

        Returns the positions of tasks that have ended already and must not run. None when Redis is away: the
        batch must not begin.
        """
        noted, self._noted = self._noted, None
        tasks = batch.tasks
        if (
            beside
            or noted is None
            or [(task.seq, task.id) for task in tasks] != [(noted.seq, noted.noted_id)]
        ):
            self._noted_idle = False  # it may be written even if the answer is lost
            try:
                ended = self._store.begin([(task.seq, task.id, b"") for task in tasks], _seqs(beside))
            except (redis.RedisError, OSError) as exc:
                self.trouble("begin", exc)
                return None
            if ended:
                return ended
        self._noted_idle = False
        return set()

    def note_reading(self, running: Sequence[Batch] = (), seq: int | None = None) -> bool:
        """Put the task that is read next on record, beside the running batches; ``seq`` None: no task.

        Returns False when Redis is away: no message may be read then that might crash the process.
        """
        seqs = _seqs(running)
        self._noted, self._noted_idle = None, False  # it may be written even if the answer is lost
        try:
            self._store.note(seqs if seq is None else [*seqs, seq])
        except (redis.RedisError, OSError) as exc:
            self.trouble("record a task that is read", exc)
            return False
        self._noted_idle = not seqs and seq is None
        return True

    def mark_started(self, batch: Batch, now: float, beside: Sequence[Batch] = ()) -> bool:
        """Mark tasks that have run for a while as started, once; return True if any were marked.

        Also write their progress from time to time, if their model reports it. ``now``: the wall clock. A
        task that runs in several batches has begun with its first.
        """
        tasks = batch.tasks
        late = {
            task.seq
            for task in tasks
            if not task.marked and now - (task.time_start or now) >= STARTED_AFTER_S
        }
        moved = set()
        if not 0 <= now - self._progress_at < PROGRESS_EVERY_S:
            moved = {task.seq for task in tasks if task.marked and task.progress != task.progress_told}
        if not late and not moved:
            return False
        pid = os.getpid()
        try:
            self._store.begin(
                [
                    (
                        task.seq,
                        task.id,
                        self._started(task, pid) if task.seq in late or task.seq in moved else b"",
                    )
                    for task in tasks
                ],
                _seqs(beside),
            )
        except (redis.RedisError, OSError) as exc:
            self.trouble("begin", exc)
            return False
        for task in tasks:
            if task.seq in late or task.seq in moved:
                task.marked, task.progress_told = True, task.progress
        self._progress_at = now
        return bool(late)

    def _started(self, task: Task, pid: int) -> bytes:
        """Return the encoded state of a running task."""
        times = {"sent_at": task.envelope.sent_at, "began_at": task.time_start}
        tells = about(task.claimed, task.envelope, self._store.versions, task.model)
        caller = place_of(task.claimed.list_key).caller
        return results.started(
            task.id, self._store.worker, pid, task.progress, times=times, about=tells, caller=caller
        )

    def ended(self, batch: Batch) -> list[Task]:
        """Return the tasks of a running batch that have a final state already: cancelled, most likely."""
        tasks = [task for task in batch.tasks if not task.ended]
        try:
            positions = self._store.ended([task.id for task in tasks]) if tasks else ()
        except (redis.RedisError, OSError) as exc:
            self.trouble("find cancelled tasks", exc)
            return []
        return [tasks[position] for position in sorted(positions)]

    def final(self, claimed: Claimed, end: Any, envelope: Envelope, task: Task | None = None) -> Final:
        """Return a task's final state for a result or an error. ``task``: None if it could not be read.

        Raises ResultTooLarge for a result.
        """
        worker, again = self._store.worker, envelope.deliveries > 0
        failed = isinstance(end, GpuinferError)
        write = results.failure if failed else results.success
        if not failed and task is not None and task.encoding == BINARY:
            if envelope.embed:  # the tasks that follow get JSON
                end = binary.inlined(*binary.split(end))
            else:
                write = results.success_in_bytes
        times = {"sent_at": envelope.sent_at, "began_at": None if task is None else task.time_start}
        ran = () if task is None else (task.model, task.ran_s, task.batch_size)
        tells = about(claimed, envelope, self._store.versions, *ran)
        place = place_of(claimed.list_key)
        meta = write(
            envelope.id, end, worker=worker, redelivered=again, times=times, about=tells, caller=place.caller
        )
        if len(meta) > self._max_bytes and not failed:
            raise ResultTooLarge(
                f"the result has {len(meta)} bytes; queue.max_result_bytes is {self._max_bytes}"
            )
        return Final(
            claimed.seq,
            envelope.id,
            meta,
            keep=not envelope.headers.get("ignore_result"),
            reply=envelope.reply_to,
            label=label(_outcome(end), place.tier, claimed.model),
            follows=self._store.chains.after(envelope, end, claimed.list_key) if envelope.embed else (),
        )

    def skipped(self, task: Task) -> Final:
        """Return what settles a task that has a final state already: it is only removed from in-flight."""
        follows = (
            self._store.chains.skipped(task.envelope, task.claimed.list_key) if task.envelope.embed else ()
        )
        place = place_of(task.claimed.list_key)
        counted = label("skipped", place.tier, task.claimed.model)
        return Final(task.seq, "", b"", label=counted, follows=follows, parent=task.id)

    def settle(self, finals: Sequence[Final], *, idle: bool) -> None:
        """Write final states, in chunks; while Redis is away they wait here and are written when it is back.

        ``idle``: no batch runs, so clear the record: a crash is charged to no task.
        """
        self._waiting += finals
        if not self._waiting and (self._noted_idle or not idle):
            return
        if idle:
            self._noted = None  # the record may be cleared even if the answer is lost
        while True:
            chunk = self._chunk()
            last = len(chunk) == len(self._waiting)
            try:
                refused = self._store.settle(chunk, idle=idle and last)
            except (redis.RedisError, OSError) as exc:
                if self._split(chunk, exc):
                    continue
                self.trouble("settle", exc)
                return
            self._most, self._alone = min(CHUNK_TASKS, 2 * self._most), 0
            del self._waiting[: len(chunk)]
            self._say_refused(refused)
            if last:
                break
        self._noted_idle, self._refused = idle, False

    def _chunk(self) -> list[Final]:
        """Return the final states to write next, within the limits of one call."""
        left = CHUNK_BYTES
        chunk: list[Final] = []
        for final in self._waiting[: self._most]:
            left -= size_of(final)
            if chunk and left < 0:
                break
            chunk.append(final)
        return chunk

    def _split(self, chunk: Sequence[Final], exc: Exception) -> bool:
        """After a chunk was refused although Redis answers, choose a smaller one. Returns True to try that.

        A final state that is refused repeatedly, alone, is most likely larger than Redis accepts, which then
        closes the connection. Its task is made to fail.
        """
        if not _closes(exc) or all(size_of(final) <= SMALL_BYTES for final in chunk):
            return False
        try:
            self._store.client.ping()
        except (redis.RedisError, OSError):
            return False
        if len(chunk) > 1:
            self._most = len(chunk) // 2
            return True
        self._alone += 1
        if self._alone < CULPRIT_TRIES:
            return True
        self._alone = 0
        culprit = chunk[0]
        error = ResultTooLarge(
            f"the result has {size_of(culprit)} bytes, and Redis refuses it ({exc}); lower "
            f"queue.max_result_bytes, now {self._max_bytes}, to refuse such results at once"
        )
        caller = results.caller_of(culprit.meta)
        meta = results.failure(culprit.task_id, error, worker=self._store.worker, caller=caller)
        counted = f"failed {culprit.label.partition(' ')[2]}"
        follows = tuple(follow for follow in culprit.follows if not follow.success)
        self._waiting[0] = culprit._replace(meta=meta, label=counted, follows=follows)
        log.error("task_failed", task_id=culprit.task_id, code=error.code, reason=str(error))
        return True

    def _say_refused(self, refused: Mapping[str, str]) -> None:
        for task_id, reason in refused.items():
            hint = (
                f"the key {RESULT_PREFIX}{task_id} has another type; the result was only sent to its caller"
            )
            log.error("result_not_kept", task_id=task_id, reason=reason, hint=hint)

    def nothing_runs(self) -> None:
        """Clear the record, even if it seems empty: a claim may have written to it."""
        self._noted_idle = False
        self.settle([], idle=True)

    def release(self, tasks: Sequence[Task | Claimed]) -> None:
        """Put tasks back, read or not. Those that have begun count as redelivered."""
        begun = {task.seq for task in tasks if isinstance(task, Task) and task.begun}
        try:
            self._store.release([task.seq for task in tasks], begun)
        except (redis.RedisError, OSError) as exc:
            self._store.mark_uncertain()  # they are put back before the next claim, or at the end
            hint = "they are put back when Redis answers"
            log.warning("release_failed", tasks=len(tasks), reason=str(exc), hint=hint)

    def reconcile(self, held: set[int]) -> None:
        """When the worker ends, put back in-flight tasks that it does not hold, if there may be any."""
        try:
            self._store.reconcile(held)
        except (redis.RedisError, OSError, WorkerRunning, TakenBack, UnusableRedis) as exc:
            hint = "tasks left in flight are put back at this worker's next start"
            log.warning("in_flight_unknown", reason=str(exc), hint=hint)

    def trouble(self, what: str, exc: Exception) -> None:
        """Log once that Redis refuses a command. That Redis is away is logged by the connection."""
        if not isinstance(exc, AWAY) and not self._refused:
            log.error("redis_refused", operation=what, reason=str(exc), hint="tried again until it works")
            self._refused = True


def _seqs(batches: Sequence[Batch]) -> list[int]:
    return [task.seq for batch in batches for task in batch.tasks]


def _closes(exc: Exception) -> bool:
    """Tell whether Redis has closed the connection, as it does when a value is too large for it."""
    if isinstance(exc, redis.ResponseError):
        return "Protocol error" in str(exc)
    return not isinstance(exc, (redis.exceptions.BusyLoadingError, redis.AuthenticationError))


def _outcome(end: Any) -> str:
    """Return the counter for a task that ended so."""
    if not isinstance(end, GpuinferError):
        return "completed"
    if isinstance(end, TaskExpired):
        return "expired"
    if isinstance(end, TaskRevoked):
        return "cancelled"
    return "failed"
