# SPDX-License-Identifier: Apache-2.0
"""Reads claimed messages into tasks. A message that can never run fails here, and never affects others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import redis

from gpuinfer.errors import (
    DeadLettered,
    GpuinferError,
    InputError,
    QueueFull,
    TaskExpired,
    TaskNotServed,
    UnknownModel,
)
from gpuinfer.log import get_logger
from gpuinfer.models.manifest import Manifest
from gpuinfer.queue import catalogue
from gpuinfer.queue.bodies import check_items
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.keys import place_of
from gpuinfer.queue.message import (
    BATCH_PREDICT,
    BUILT_IN_PREFIX,
    Envelope,
    Undecodable,
    decode,
    peek,
    tasks_by_name,
)
from gpuinfer.queue.sink import TaskChannel
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.outbox import Outbox
from gpuinfer.worker.task import Elsewhere, Task, read
from gpuinfer.worker.task_log import TaskLog

log = get_logger(__name__)


#: A larger message is put on record before it is read.
LARGE_BYTES = 1024 * 1024
#: The start of a message that was in flight when a worker died; written by restore.lua.
_MARK = b'{"gpuinfer": ['


class _Later(Exception):
    """Raised for a message that must not be read while a batch runs."""


@dataclass(slots=True)
class _Taken:
    """The result of reading some messages."""

    tasks: list[Task] = field(default_factory=list)
    finals: list[Final] = field(default_factory=list)
    #: Messages for models that are not served here: with each, the name of its model.
    elsewhere: list[tuple[Claimed, Envelope, str]] = field(default_factory=list)
    unread: list[Claimed] = field(default_factory=list)
    #: Bytes of the arguments read so far.
    size: int = 0


class _Record:
    """The record of which task is being read, in addition to the running batches."""

    def __init__(self, outbox: Outbox, running: Sequence[Batch]) -> None:
        self._outbox = outbox
        self._running = running
        self._written = False
        #: True while a task runs that was in a crash. Nothing is read then: another crash must be its own.
        self.closed = any(task.envelope.deaths for batch in running for task in batch.tasks)

    def put(self, claimed: Claimed, *, suspect: bool) -> bool:
        """Put a task on record. Returns False when Redis is away.

        Raises _Later for a suspect while a batch runs, as a crash would be charged to both.
        """
        if claimed.noted_id is not None:  # the claim has put it on record
            return True
        if suspect and self._running:
            raise _Later
        self._written = self._outbox.note_reading(self._running, claimed.seq)
        return self._written

    def clear(self) -> None:
        """Remove the task that was read from the record."""
        if self._written:
            self._outbox.note_reading(self._running)
            self._written = False


class Intake:
    """Reads messages for one worker.

    Reading a message may crash the process: a few kilobytes may unpack to gigabytes. So a message that is
    compressed or large, or was in flight when a worker died (a suspect), is put on record before it is read:
    a crash is charged to it, and not to the messages read with it.
    """

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        celery_state: CeleryState,
        manifests: Mapping[str, Manifest],
        settings: Settings,
        lines: TaskLog,
    ) -> None:
        self._store = store
        self._lines = lines
        self._outbox = outbox
        self._celery = celery_state
        self._manifests = manifests
        self._settings = settings
        self._names = tasks_by_name(settings.queue)
        #: Claimed messages that must not be read before the running batch has ended.
        self.waiting: list[Claimed] = []
        #: Bytes of one task's arguments as text, a moving average.
        self.task_bytes = 4096.0

    def read(
        self, channel: TaskChannel, claims: Sequence[Claimed], running: Sequence[Batch], room: int
    ) -> tuple[list[Task], list[Final], list[Claimed]]:
        """Read messages. Returns the tasks to run, the final states of others, and messages not read for want
        of memory.

        Messages that waited are read first. ``running``: the batches that run meanwhile; ``room``: the bytes
        of arguments that may be held, exceeded by one task at most. Tasks with other names go through
        Celery's own strategy.
        """
        taken = _Taken()
        record = _Record(self._outbox, running)
        claims = [*self.waiting, *claims]
        self.waiting = []
        for position, claimed in enumerate(claims):
            if taken.size > 0 and taken.size >= room:
                taken.unread = claims[position:]
                break
            try:
                self._read(channel, claimed, record, taken)
            except _Later:
                self.waiting.append(claimed)
            except Undecodable as exc:
                self._bury(claimed, str(exc))
            except (ValueError, TypeError, ArithmeticError, RecursionError) as exc:
                # A message from anybody may be malformed in any way; the others must still be read.
                log.exception("message_unreadable", queue=place_of(claimed.list_key).tier)
                self._bury(claimed, f"{type(exc).__name__}: {exc}")
        record.clear()
        if taken.elsewhere:
            self._pass_on(taken.elsewhere, taken.finals)
        tasks = self._due(taken.tasks, taken.finals)
        self._lines.tell()
        for task in tasks:
            self._celery.received(task)
        return tasks, taken.finals, taken.unread

    def _read(self, channel: TaskChannel, claimed: Claimed, record: _Record, taken: _Taken) -> None:
        """Read one message. Raises _Later, Undecodable, and any error that a malformed message may cause."""
        if record.closed:
            raise _Later
        suspect = claimed.payload.startswith(_MARK)
        envelope = None
        if not suspect and len(claimed.payload) <= LARGE_BYTES:
            envelope = peek(claimed.payload)
        if envelope is None or envelope.headers.get("compression") or envelope.beside > LARGE_BYTES:
            if not record.put(claimed, suspect=suspect):
                self._store.mark_uncertain()  # it is put back at the next claim, and comes again
                return
        else:
            record.clear()
        envelope = envelope or decode(claimed.payload)
        if envelope.task not in self._names and not envelope.task.startswith(BUILT_IN_PREFIX):
            channel.deliver(claimed)
            return
        body = None
        if envelope.beside:
            try:
                body = self._store.body(envelope.id)
                if body is None:
                    self._end_without_body(claimed, envelope, taken)
                    return
            except (redis.RedisError, OSError) as exc:
                self._store.mark_uncertain()  # it is put back at the next claim, and comes again
                self._outbox.trouble("fetch", exc)
                return
        try:
            self._admit(claimed, envelope, body, taken)
        except Elsewhere as exc:
            taken.elsewhere.append((claimed, envelope, exc.model))
        claimed.payload = b""
        envelope.forget()
        taken.size += envelope.size
        self.task_bytes += (max(envelope.size, 1) - self.task_bytes) / 16

    def _due(self, tasks: list[Task], finals: list[Final]) -> list[Task]:
        """Return the tasks that are due by the clock of Redis; those with a later ETA wait there."""
        later = {i: task.eta for i, task in enumerate(tasks) if task.eta is not None}
        if not later:
            return tasks
        try:
            answer = self._store.postpone([(tasks[i].seq, eta) for i, eta in later.items()])
        except (redis.RedisError, OSError) as exc:
            self._store.mark_uncertain()  # they are put back at the next claim, and come again
            self._outbox.trouble("postpone", exc)
            return [task for i, task in enumerate(tasks) if i not in later]
        places = list(later)
        for place in answer.refused:
            task = tasks[places[place]]
            error = QueueFull(answer.why, "eta")
            finals.append(self._outbox.final(task.claimed, error, task.envelope))
            self._lines.task_refused(task.claimed, task.id, error)
        gone = later.keys() - {places[place] for place in answer.due}
        return [task for i, task in enumerate(tasks) if i not in gone]

    def _end_without_body(self, claimed: Claimed, envelope: Envelope, taken: _Taken) -> None:
        """End a task whose body is gone, most likely because the task has ended already."""
        if envelope.headers.get("ignore_result") or self._store.ended([envelope.id]):
            taken.finals.append(Final(claimed.seq, "", b""))
            return
        error = InputError("its body is no longer in Redis: somebody has deleted it", "inputs")
        taken.finals.append(self._outbox.final(claimed, error, envelope))
        self._lines.task_refused(claimed, envelope.id, error)

    def _pass_on(self, claims: Sequence[tuple[Claimed, Envelope, str]], finals: list[Final]) -> None:
        """Pass tasks on to the lists of their model; fail those whose model the fleet does not know."""
        models = {claimed.seq: model for claimed, _, model in claims}
        try:
            unknown = catalogue.unknown(self._store.client, dict.fromkeys(models.values()))
            known = {seq: model for seq, model in models.items() if model not in unknown}
            self._store.release(known, models=known)
        except (redis.RedisError, OSError) as exc:
            self._store.mark_uncertain()  # they are put back at the next claim, and come again
            self._outbox.trouble("pass on", exc)
            return
        for claimed, envelope, model in claims:
            if model in unknown:
                error = UnknownModel(f"the fleet knows no model {model!r}", "model")
                finals.append(self._outbox.final(claimed, error, envelope))
                self._lines.task_refused(claimed, envelope.id, error)

    def _admit(self, claimed: Claimed, envelope: Envelope, body: bytes | None, taken: _Taken) -> None:
        try:
            task = self._task(claimed, envelope, body)
            if task.eta is not None and task.expires_at is not None and task.expires_at <= task.eta:
                raise TaskExpired("its deadline comes before its ETA: it can never begin", "expires")
        except Undecodable:
            raise
        except GpuinferError as exc:
            taken.finals.append(self._outbox.final(claimed, exc, envelope))
            self._lines.task_refused(claimed, envelope.id, exc)
            return
        taken.tasks.append(task)

    def _task(self, claimed: Claimed, envelope: Envelope, body: bytes | None) -> Task:
        name = self._names.get(envelope.task)
        if name is None:
            raise TaskNotServed(
                f"{envelope.task} is a built-in task of Celery, which a GPU worker does not run; send it to "
                "your own Celery workers",
                "task",
            )
        max_bytes = self._settings.queue.max_payload_bytes
        many = name == BATCH_PREDICT
        task = read(claimed, envelope, self._manifests, max_bytes, many=many, beside=body)
        check_items(len(task.inputs), self._settings.queue.max_items)
        return task

    def _bury(self, claimed: Claimed, reason: str) -> None:
        error = DeadLettered(f"cannot be decoded: {reason}")
        try:
            self._store.bury(claimed.seq, claimed.list_key, claimed.payload, error)
        except (redis.RedisError, OSError) as exc:
            self._store.mark_uncertain()  # it is put back at the next claim, and comes again
            self._outbox.trouble("bury", exc)
