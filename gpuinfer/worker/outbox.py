# SPDX-License-Identifier: Apache-2.0
"""What Redis is told of a worker's tasks: which batch runs, and how tasks ended.

The record of what runs says on whose account a death goes. A claim of an idle worker that takes a
single task writes it along, as that task runs next, unless the worker dies before it reads the answer;
any other batch is written before it begins.
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

#: A task that runs for this long is marked as started; a shorter one has ended before anybody looks.
STARTED_AFTER_S = 0.1
#: Seconds between two writes of how far what runs is.
PROGRESS_EVERY_S = 1.0
#: One call writes at most this many ends, and bytes: Redis does nothing else meanwhile.
CHUNK_TASKS, CHUNK_BYTES = 1000, 4 * 1024 * 1024
#: An end that Redis refuses this often in a row, alone and while it answers otherwise, is given up.
CULPRIT_TRIES = 3
#: What is smaller than this is not too large for any Redis: proto-max-bulk-len is 1 MiB at least.
SMALL_BYTES = 64 * 1024


class Outbox:
    """Writes through the store; final states wait here while Redis is away."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._max_bytes = store.max_result_bytes
        #: How many ends the next chunk has at most, and how often one was tried alone in a row.
        self._most, self._alone = CHUNK_TASKS, 0
        self._waiting: list[Final] = []
        #: What the last claim has put on record, as long as nothing else was written there.
        self._noted: Claimed | None = None
        self._noted_idle = True
        self._refused = False
        #: The wall clock when the state of what runs was written last.
        self._progress_at = 0.0

    @property
    def unsettled(self) -> Sequence[Final]:
        """Final states that Redis has not taken yet."""
        return self._waiting

    def held(self) -> set[int]:
        """Return their places in flight."""
        return {final.seq for final in self._waiting if final.seq is not None}

    def claimed(self, claims: Sequence[Claimed]) -> None:
        """Remember what the claim has put on record."""
        self._noted = next((one for one in claims if one.noted_id is not None), None)
        if self._noted is not None:
            self._noted_idle = False

    def begin(self, batch: Batch, beside: Sequence[Batch] = ()) -> set[int] | None:
        """Put a batch on record, beside those that run.

        Returns the positions of what must not run: it has ended already. None when Redis is away: the batch
        must not begin.
        """
        noted, self._noted = self._noted, None
        tasks = batch.tasks
        if (
            beside
            or noted is None
            or [(task.seq, task.id) for task in tasks] != [(noted.seq, noted.noted_id)]
        ):
            self._noted_idle = False  # written, even if the answer should be lost
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
        """Put the task on record that is read next, beside the batches that run; None: none is any more.

        False when Redis is away: nothing must be read that may end the process.
        """
        seqs = _seqs(running)
        self._noted, self._noted_idle = None, False  # written, even if the answer should be lost
        try:
            self._store.note(seqs if seq is None else [*seqs, seq])
        except (redis.RedisError, OSError) as exc:
            self.trouble("note what is read", exc)
            return False
        self._noted_idle = not seqs and seq is None
        return True

    def mark_started(self, batch: Batch, now: float, beside: Sequence[Batch] = ()) -> bool:
        """Write the state of tasks that take their time: running, and where; once. True when it was.

        And how far they are, now and then, where their model tells. ``now`` is the wall clock. A job of many
        short slices has begun with its first.
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
        """Return the state of a task that runs."""
        times = {"sent_at": task.envelope.sent_at, "began_at": task.time_start}
        tells = about(task.claimed, task.envelope, self._store.versions, task.model)
        caller = place_of(task.claimed.list_key).caller
        return results.started(
            task.id, self._store.worker, pid, task.progress, times=times, about=tells, caller=caller
        )

    def ended(self, batch: Batch) -> list[Task]:
        """Return the tasks of a batch that have ended while it runs: it is for nothing that they run."""
        tasks = [task for task in batch.tasks if not task.ended]
        try:
            positions = self._store.ended([task.id for task in tasks]) if tasks else ()
        except (redis.RedisError, OSError) as exc:
            self.trouble("look", exc)
            return []
        return [tasks[position] for position in sorted(positions)]

    def final(self, claimed: Claimed, end: Any, envelope: Envelope, task: Task | None = None) -> Final:
        """Return the end of a task: a result, or an error. ``task``: as it was read, where it could be.

        Raises ResultTooLarge for a result.
        """
        worker, again = self._store.worker, envelope.deliveries > 0
        failed = isinstance(end, GpuinferError)
        write = results.failure if failed else results.success
        if not failed and task is not None and task.encoding == BINARY:
            if envelope.embed:  # what follows gets JSON
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
        """Return the end of a task that has its final state already: it leaves flight."""
        follows = (
            self._store.chains.skipped(task.envelope, task.claimed.list_key) if task.envelope.embed else ()
        )
        place = place_of(task.claimed.list_key)
        counted = label("skipped", place.tier, task.claimed.model)
        return Final(task.seq, "", b"", label=counted, follows=follows, parent=task.id)

    def settle(self, finals: Sequence[Final], *, idle: bool) -> None:
        """Write final states, in chunks; while Redis is away they wait here and are written when it is back.

        ``idle``: nothing runs, so a death is on nobody's account.
        """
        self._waiting += finals
        if not self._waiting and (self._noted_idle or not idle):
            return
        if idle:
            self._noted = None  # wiped, even if the answer should be lost
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
        """Return the ends to write next, within the bounds of one call."""
        left = CHUNK_BYTES
        chunk: list[Final] = []
        for final in self._waiting[: self._most]:
            left -= size_of(final)
            if chunk and left < 0:
                break
            chunk.append(final)
        return chunk

    def _split(self, chunk: Sequence[Final], exc: Exception) -> bool:
        """After a chunk that was not written although Redis answers, choose a smaller one; True: write it.

        An end that is not written alone, again and again, is the culprit: larger than Redis takes, most
        likely, which then closes the connection. Its task ends as a failure.
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
            f"the result has {size_of(culprit)} bytes, and Redis does not take it ({exc}); lower "
            f"queue.max_result_bytes, now {self._max_bytes}, to refuse the like at once"
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
                f"something else stands under {RESULT_PREFIX}{task_id}; its caller was told, nothing is kept"
            )
            log.error("result_not_kept", task_id=task_id, reason=reason, hint=hint)

    def nothing_runs(self) -> None:
        """Wipe the record, whatever a claim may have put there."""
        self._noted_idle = False
        self.settle([], idle=True)

    def release(self, tasks: Sequence[Task | Claimed]) -> None:
        """Put tasks back, read or not; of what has run in part, the rest is a repeat."""
        begun = {task.seq for task in tasks if isinstance(task, Task) and task.begun}
        try:
            self._store.release([task.seq for task in tasks], begun)
        except (redis.RedisError, OSError) as exc:
            self._store.mark_uncertain()  # what is not held is put back before the next claim, or at the end
            hint = "put back when Redis answers"
            log.warning("release_failed", tasks=len(tasks), reason=str(exc), hint=hint)

    def reconcile(self, held: set[int]) -> None:
        """At the end of a worker: put back what is in flight and, in doubt, not held."""
        try:
            self._store.reconcile(held)
        except (redis.RedisError, OSError, WorkerRunning, TakenBack, UnusableRedis) as exc:
            hint = "what is there is put back at this worker's next start"
            log.warning("in_flight_unknown", reason=str(exc), hint=hint)

    def trouble(self, what: str, exc: Exception) -> None:
        """Say once that Redis refuses; that it is away, the connection says."""
        if not isinstance(exc, AWAY) and not self._refused:
            log.error("redis_refused", operation=what, reason=str(exc), hint="tried again until it works")
            self._refused = True


def _seqs(batches: Sequence[Batch]) -> list[int]:
    return [task.seq for batch in batches for task in batch.tasks]


def _closes(exc: Exception) -> bool:
    """Tell whether Redis has closed the connection, as it does when what is sent is too large for it."""
    if isinstance(exc, redis.ResponseError):
        return "Protocol error" in str(exc)
    return not isinstance(exc, (redis.exceptions.BusyLoadingError, redis.AuthenticationError))


def _outcome(end: Any) -> str:
    """Return what an end is counted as."""
    if not isinstance(end, GpuinferError):
        return "completed"
    if isinstance(end, TaskExpired):
        return "expired"
    if isinstance(end, TaskRevoked):
        return "cancelled"
    return "failed"
