# SPDX-License-Identifier: Apache-2.0
"""From claimed messages to work: what can never run ends here, and takes no neighbour along."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import redis

from gpuinfer.errors import DeadLettered, GpuinferError, UnknownModel
from gpuinfer.log import get_logger
from gpuinfer.models.manifest import Manifest
from gpuinfer.queue.keys import place_of
from gpuinfer.queue.message import Envelope, Undecodable, decode
from gpuinfer.queue.sink import TaskChannel
from gpuinfer.queue.store import Claimed, Final, Store
from gpuinfer.settings import Settings
from gpuinfer.worker import story
from gpuinfer.worker.bookkeeping import Bookkeeping
from gpuinfer.worker.ledger import Ledger
from gpuinfer.worker.work import Elsewhere, Work, is_inference, read

log = get_logger(__name__)


class Intake:
    """Reads messages for one worker."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        books: Bookkeeping,
        manifests: Mapping[str, Manifest],
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._books = books
        self._manifests = manifests
        self._settings = settings
        self._clock = clock
        self._wall = wall
        #: Bytes of one payload, a moving average.
        self.payload_bytes = 4096.0

    def read(self, channel: TaskChannel, tasks: Sequence[Claimed]) -> tuple[list[Work], list[Final]]:
        """Return what can run, and the ends of what cannot. What is none of ours goes Celery's own way."""
        works: list[Work] = []
        finals: list[Final] = []
        elsewhere: list[tuple[Claimed, Envelope, str]] = []
        for task in tasks:
            self.payload_bytes += (len(task.payload) - self.payload_bytes) / 16
            try:
                envelope = decode(task.payload)
                if not is_inference(envelope.task):
                    channel.deliver(task)
                    continue
                self._admit(task, envelope, works, finals)
            except Elsewhere as exc:
                elsewhere.append((task, envelope, exc.model))
            except Undecodable as exc:
                self._bury(task, str(exc))
            except (ValueError, TypeError, ArithmeticError, RecursionError) as exc:
                # Whatever a stranger's message may do to us, it must not take its neighbours along.
                log.exception("message_unreadable", queue=place_of(task.list_key).tier)
                self._bury(task, f"{type(exc).__name__}: {exc}")
        if elsewhere:
            self._pass_on(elsewhere, finals)
        return works, finals

    def _pass_on(self, tasks: Sequence[tuple[Claimed, Envelope, str]], finals: list[Final]) -> None:
        """Pass tasks on to the lists of their model; those of a model that the fleet does not know end."""
        models = {task.seq: model for task, _, model in tasks}
        try:
            unknown = self._store.unknown(dict.fromkeys(models.values()))
            known = {seq: model for seq, model in models.items() if model not in unknown}
            self._store.release(known, models=known)
        except (redis.RedisError, OSError) as exc:
            self._store.doubt()  # they are put back at the next claim, and come again
            self._ledger.trouble("pass on", exc)
            return
        for task, envelope, model in tasks:
            if model in unknown:
                error = UnknownModel(f"no worker of this fleet has served a model {model!r}", "model")
                finals.append(self._ledger.final(task, error, envelope))
                story.task_refused(task, envelope.id, error)

    def _admit(self, task: Claimed, envelope: Envelope, works: list[Work], finals: list[Final]) -> None:
        try:
            work = read(task, envelope, self._manifests, self._settings.queue.max_payload_bytes)
        except Undecodable:
            raise
        except GpuinferError as exc:
            finals.append(self._ledger.final(task, exc, envelope))
            story.task_refused(task, envelope.id, exc)
            return
        if work.eta is not None and work.eta > self._wall():
            work.not_before = self._clock() + work.eta - self._wall()
        self._books.received(work)
        works.append(work)

    def _bury(self, task: Claimed, reason: str) -> None:
        error = DeadLettered(f"cannot be decoded: {reason}")
        try:
            self._store.bury(task.seq, task.list_key, task.payload, error)
        except (redis.RedisError, OSError) as exc:
            self._store.doubt()  # it is put back at the next claim, and comes again
            self._ledger.trouble("bury", exc)
