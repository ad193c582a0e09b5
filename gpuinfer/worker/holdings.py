# SPDX-License-Identifier: Apache-2.0
"""What a worker holds: all that it has claimed and not settled, wherever that is.

A task is unread (``intake``), waits (``buffer``), is with the device (``engine``), or has an end that Redis
has not taken yet (``outbox``). No other worker can run it meanwhile.
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

#: Bytes of arguments, as text and unpacked, that a worker holds at most, beside the oldest of its batches.
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
        #: Whether it is drained: nothing begins any more.
        self.closed = False
        #: Whether the process ends by a fault: the record of what ran stays in Redis.
        self.crashed = False
        #: The batch that has ended while more urgent tasks are claimed before its ends are written.
        self.finishing: Batch | None = None
        #: Seqs of tasks that a reaper has put back while they ran here.
        self.taken_back: set[int] = set()
        #: Those among them that go on where they are claimed next, until their batch is finished.
        self.dropped: set[int] = set()
        self.debug = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)

    @property
    def state(self) -> State:
        """Whether a batch runs (busy), nothing runs (free), or nothing is held either (idle)."""
        if self.engine.current is not None:
            return "busy"
        held = (
            self.finishing is not None
            or self.buffer.ready
            or self.intake.waiting
            or self.outbox.unsettled
            or self.engine.on_account
        )
        return "free" if held else "idle"

    @property
    def spare_bytes(self) -> int:
        """How many more bytes of arguments may be held. The oldest batch does not count."""
        behind = (task.size for batch in self.engine.batches[1:] for task in batch.tasks)
        return BUFFER_BYTES - self.buffer.size - sum(behind)

    def seqs(self) -> set[int]:
        """Return the seqs of everything claimed and not settled."""
        tasks = chain(self.buffer, *(batch.tasks for batch in self._with_device()))
        unread = {claimed.seq for claimed in self.intake.waiting}
        return ({task.seq for task in tasks} - self.dropped) | unread | self.outbox.held()

    def _with_device(self) -> list[Batch]:
        """Return the batches that run, and the one whose ends are not written yet."""
        finishing = () if self.finishing is None else (self.finishing,)
        return [*self.engine.batches, *finishing]

    def strays(self) -> set[Task]:
        """Return the tasks of withdrawn batches that a thread still prepares."""
        return {task for batch in self.engine.pipeline.strays() for task in batch.tasks}

    def withdraw(self) -> bool:
        """Put the batch that is ahead back into the buffer; False where the device has begun it."""
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
        """Give tasks of the buffer, and unread ones, back to their lists, for other workers.

        Not those that a thread still prepares: a crash in there must be charged to them.
        """
        strays = self.strays()
        tasks = [task for task in tasks if task not in strays]
        self.buffer.remove(tasks)
        for task in tasks:
            self.celery.finished(task, None)
        self.outbox.release([*tasks, *unread])
        task_log.handed_back(tasks, len(unread))

    def settle(self, finals: Sequence[Final] = ()) -> None:
        """Write final states; when nothing runs, also clear the record of what runs."""
        idle = self.engine.current is None and not self.crashed
        self.outbox.settle(finals, idle=idle and not self.engine.pipeline.strays())

    def lose(self, error: TakenBack) -> None:
        """Drop what a reaper has put back. What runs is finished: its end counts if it is the first."""
        self.withdraw()
        tasks = self.buffer.clear()
        self.intake.waiting = []
        for task in tasks:
            self.celery.finished(task, None)
        running = [task for batch in self._with_device() for task in batch.tasks]
        self.taken_back = {task.seq for task in running}
        task_log.taken_back([*tasks, *running], error)
