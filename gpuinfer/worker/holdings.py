# SPDX-License-Identifier: Apache-2.0
"""What a worker holds: all tasks that it has claimed and not settled.

A task is unread (``intake``), waits (``buffer``), is in the engine (``engine``), or has a final state that is
not in Redis yet (``outbox``). No other worker can run it meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain

from gpuinfer.errors import TakenBack
from gpuinfer.models.manifest import Manifest
from gpuinfer.queue.claims import Claimed, Final, State
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings
from gpuinfer.worker import task_log
from gpuinfer.worker.buffer import Batch, Buffer
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.engine import Engine
from gpuinfer.worker.intake import Intake
from gpuinfer.worker.outbox import Outbox
from gpuinfer.worker.task import Task
from gpuinfer.worker.task_log import TaskLog

#: Maximum bytes of arguments, as unpacked text, that a worker holds; its oldest batch does not count.
BUFFER_BYTES = 64 * 1024 * 1024


class Holdings:
    """The tasks of one worker. For its main thread."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        manifests: Mapping[str, Manifest],
        settings: Settings,
        celery: CeleryState,
        lines: TaskLog,
    ) -> None:
        self.store = store
        self.engine = engine
        #: The manifests of the models served, by name.
        self.models = manifests
        self.celery = celery
        self.lines = lines
        self.buffer = Buffer(engine.limit)
        self.outbox = Outbox(store)
        self.intake = Intake(store, self.outbox, celery, manifests, settings, lines)
        #: True once the worker drains: no batch begins after that.
        self.closed = False
        #: Whether the process ends after a fault: the record of the running batches stays in Redis.
        self.crashed = False
        #: A batch that has run, while tasks are claimed before its final states are written.
        self.finishing: Batch | None = None
        #: Seqs of tasks that a reaper has put back while they ran here.
        self.taken_back: set[int] = set()
        #: Those of them whose remaining inputs run where they are claimed next, until this batch is finished.
        self.dropped: set[int] = set()
        self.debug = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)

    @property
    def state(self) -> State:
        """Busy while a batch runs; free when none runs but tasks are held; idle when none are held."""
        if self.engine.current is not None:
            return "busy"
        held = (
            self.finishing is not None
            or self.buffer.ready
            or self.intake.waiting
            or self.outbox.unsettled
            or self.engine.chargeable
        )
        return "free" if held else "idle"

    @property
    def spare_bytes(self) -> int:
        """How many more bytes of arguments the worker may hold. Its oldest batch does not count."""
        behind = (task.size for batch in self.engine.batches[1:] for task in batch.tasks)
        return BUFFER_BYTES - self.buffer.size - sum(behind)

    def seqs(self) -> set[int]:
        """Return the seqs of all tasks that are claimed and not settled."""
        tasks = chain(self.buffer, *(batch.tasks for batch in self._with_device()))
        unread = {claimed.seq for claimed in self.intake.waiting}
        return ({task.seq for task in tasks} - self.dropped) | unread | self.outbox.held()

    def _with_device(self) -> list[Batch]:
        """Return the batches in the engine, and the one whose final states are not written yet."""
        finishing = () if self.finishing is None else (self.finishing,)
        return [*self.engine.batches, *finishing]

    def strays(self) -> set[Task]:
        """Return the tasks of withdrawn batches of which a thread still prepares an input."""
        return {task for batch in self.engine.pipeline.strays() for task in batch.tasks}

    def withdraw(self) -> bool:
        """Put the batch behind the running one back into the buffer; False if the device has begun it."""
        batch = self.engine.withdraw()
        if batch is None:
            return False
        unbegun = [
            task for task in batch.tasks if not (task.outcomes or task.retries or task.ran_s or task.alone)
        ]
        for task in unbegun:
            task.time_start = None
        self.buffer.add_all(batch.tasks)
        if self.debug:
            task_log.batch_withdrawn(batch, unbegun)
        return True

    def put_back(self, tasks: Sequence[Task], unread: Sequence[Claimed] = ()) -> None:
        """Return tasks of the buffer, and unread ones, to their lists, for other workers.

        A task that a thread still prepares stays: if preparing it crashes the process, it must be charged.
        """
        strays = self.strays()
        tasks = [task for task in tasks if task not in strays]
        self.buffer.remove(tasks)
        for task in tasks:
            self.celery.finished(task, None)
        self.outbox.release([*tasks, *unread])
        task_log.handed_back(tasks, len(unread))

    def settle(self, finals: Sequence[Final] = ()) -> None:
        """Write final states; when no batch runs, also clear the record of running batches."""
        idle = self.engine.current is None and not self.crashed
        self.outbox.settle(finals, idle=idle and not self.engine.pipeline.strays())

    def lose(self, error: TakenBack) -> None:
        """Drop the tasks that a reaper has put back.

        Running ones are finished here all the same: the first final state that is written counts.
        """
        self.withdraw()
        tasks = self.buffer.clear()
        self.intake.waiting = []
        for task in tasks:
            self.celery.finished(task, None)
        running = [task for batch in self._with_device() for task in batch.tasks]
        self.taken_back = {task.seq for task in running}
        task_log.taken_back([*tasks, *running], error)
