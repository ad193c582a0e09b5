# SPDX-License-Identifier: Apache-2.0
"""From claimed messages to work: what can never run ends here, and takes no neighbour along."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import redis

from gpuinfer.errors import DeadLettered, GpuinferError, UnknownModel
from gpuinfer.log import get_logger
from gpuinfer.models.manifest import Manifest
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.keys import place_of
from gpuinfer.queue.message import Envelope, Undecodable, decode
from gpuinfer.queue.sink import TaskChannel
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings
from gpuinfer.worker import task_log
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.outbox import Outbox
from gpuinfer.worker.task import Elsewhere, Task, is_inference, read

log = get_logger(__name__)


class Intake:
    """Reads messages for one worker."""

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        celery_state: CeleryState,
        manifests: Mapping[str, Manifest],
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._outbox = outbox
        self._celery = celery_state
        self._manifests = manifests
        self._settings = settings
        self._clock = clock
        self._wall = wall
        #: Bytes of one payload, a moving average.
        self.payload_bytes = 4096.0

    def read(self, channel: TaskChannel, claims: Sequence[Claimed]) -> tuple[list[Task], list[Final]]:
        """Return what can run, and the ends of what cannot. What is none of ours goes Celery's own way."""
        tasks: list[Task] = []
        finals: list[Final] = []
        elsewhere: list[tuple[Claimed, Envelope, str]] = []
        for claimed in claims:
            self.payload_bytes += (len(claimed.payload) - self.payload_bytes) / 16
            try:
                envelope = decode(claimed.payload)
                if not is_inference(envelope.task):
                    channel.deliver(claimed)
                    continue
                self._admit(claimed, envelope, tasks, finals)
            except Elsewhere as exc:
                elsewhere.append((claimed, envelope, exc.model))
            except Undecodable as exc:
                self._bury(claimed, str(exc))
            except (ValueError, TypeError, ArithmeticError, RecursionError) as exc:
                # Whatever a stranger's message may do to us, it must not take its neighbours along.
                log.exception("message_unreadable", queue=place_of(claimed.list_key).tier)
                self._bury(claimed, f"{type(exc).__name__}: {exc}")
        if elsewhere:
            self._pass_on(elsewhere, finals)
        return tasks, finals

    def _pass_on(self, claims: Sequence[tuple[Claimed, Envelope, str]], finals: list[Final]) -> None:
        """Pass tasks on to the lists of their model; those of a model that the fleet does not know end."""
        models = {claimed.seq: model for claimed, _, model in claims}
        try:
            unknown = self._store.unknown(dict.fromkeys(models.values()))
            known = {seq: model for seq, model in models.items() if model not in unknown}
            self._store.release(known, models=known)
        except (redis.RedisError, OSError) as exc:
            self._store.mark_uncertain()  # they are put back at the next claim, and come again
            self._outbox.trouble("pass on", exc)
            return
        for claimed, envelope, model in claims:
            if model in unknown:
                error = UnknownModel(f"no worker of this fleet has served a model {model!r}", "model")
                finals.append(self._outbox.final(claimed, error, envelope))
                task_log.task_refused(claimed, envelope.id, error)

    def _admit(self, claimed: Claimed, envelope: Envelope, tasks: list[Task], finals: list[Final]) -> None:
        try:
            task = read(claimed, envelope, self._manifests, self._settings.queue.max_payload_bytes)
        except Undecodable:
            raise
        except GpuinferError as exc:
            finals.append(self._outbox.final(claimed, exc, envelope))
            task_log.task_refused(claimed, envelope.id, exc)
            return
        if task.eta is not None and task.eta > self._wall():
            task.not_before = self._clock() + task.eta - self._wall()
        self._celery.received(task)
        tasks.append(task)

    def _bury(self, claimed: Claimed, reason: str) -> None:
        error = DeadLettered(f"cannot be decoded: {reason}")
        try:
            self._store.bury(claimed.seq, claimed.list_key, claimed.payload, error)
        except (redis.RedisError, OSError) as exc:
            self._store.mark_uncertain()  # it is put back at the next claim, and comes again
            self._outbox.trouble("bury", exc)
