# SPDX-License-Identifier: Apache-2.0
"""Prepare ► device ► finish: runs a model's own code and file decoders in threads beside the device thread.

::

    submit ─► prepare (one thread per core) ─► take: device thread ─► finish (one thread per core) ─► done

Each input is prepared separately, under its task's time limits; one that fails never reaches the device.
Arrays and lists are different: a whole batch of them is staged at once (see ``staging``). Prepared inputs
that wait for the device use up to PREPARED_BYTES per batch; the others are prepared as the device takes
some. One batch is on the device, at most one waits for it, at most one is being finished. A preparing thread
never waits for another input: an input for which there is no memory is put aside, and queued again when the
device has taken some.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakSet

from gpuinfer.errors import GpuinferError, InferenceError, TaskRevoked
from gpuinfer.models.blame import described
from gpuinfer.models.context import Work, working
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.crew import Crew
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.staging import WORTH_A_THREAD_S, Stager, Staging, values_of
from gpuinfer.worker.task import Task

#: Maximum bytes of prepared inputs per batch; the input that the device needs next is prepared in any case.
PREPARED_BYTES = 256 * 1024 * 1024
#: Maximum number of values in a prepared input that are measured.
_COUNTED = 1000

#: ``waiting``: to be prepared when its batch is submitted (again); ``aside``: when there is memory for it.
_Stage = Literal["waiting", "queued", "aside", "begun", "ready"]


class Slot:
    """One input on its way to the device."""

    __slots__ = ("index", "item", "place", "run", "size", "stage", "task")

    def __init__(self, task: Task, index: int) -> None:
        self.task = task
        self.index = index
        self.stage: _Stage = "waiting"
        #: The batch that it is in now, and its position there.
        self.run: Run | None = None
        self.place = 0
        #: What ``prepare`` returned, or its error; and its size in bytes.
        self.item: Any = None
        self.size = 0


class Run:
    """One batch in the engine, from its submission until it is collected."""

    def __init__(self, batch: Batch, model: LoadedModel) -> None:
        self.batch = batch
        self.model = model
        #: Acquired once: by the device thread when it begins the batch, or by ``Engine.withdraw``.
        self.gate = threading.Lock()
        #: One per input, if inputs are prepared separately; else None.
        self.slots: list[Slot] | None = None
        #: Set if the batch is staged as a whole.
        self.staging: Staging | None = None
        #: Seconds for which the device thread has waited for inputs.
        self.waited_s = 0.0
        #: Bytes of inputs that are prepared and not taken.
        self.bytes = 0
        #: The range of inputs that the device needs next, and how many of them are not ready.
        self.first = self.until = self.missing = 0

    @property
    def tasks(self) -> list[Task]:
        """The task of each input."""
        return [part.task for part in self.batch.parts for _ in range(part.start, part.stop)]

    @property
    def values(self) -> list[Any]:
        """The inputs, in order."""
        return values_of(self.batch)

    def work(self, tasks: Sequence[Task]) -> Work:
        """Return the context of a model's code that runs for these tasks."""
        return Work(
            model=self.model.name,
            task_ids=[task.id for task in tasks],
            cancelled=lambda: all(task.ended for task in tasks),
            progress=partial(_note_progress, tasks),
        )


def _note_progress(tasks: Sequence[Task], fraction: float) -> None:
    for task in tasks:
        task.progress = fraction


class Pipeline:
    """The threads that prepare and finish. ``enter`` and ``leave`` are for the main thread."""

    def __init__(
        self,
        deadline: Deadline,
        threads: int,
        moved: Callable[[], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self._deadline = deadline
        self._before = Crew("prepare", threads, broken)
        self._behind = Crew("finish", threads, broken)
        #: Called when a step of an input begins or ends.
        self._moved = moved
        self._changed = threading.Condition()
        #: Withdrawn batches of which a thread may still prepare an input; tasks that keep prepared inputs.
        self._strays: list[Run] = []
        self._keeping: WeakSet[Task] = WeakSet()
        #: One batch is finished at a time; the device waits if finishing is slower.
        self._finishing = threading.Semaphore(1)
        #: Decodes and stages whole batches.
        self.stager = Stager()
        #: Model -> seconds that preparing one input takes, a moving average.
        self.prepare_s: dict[str, float] = {}

    @property
    def threads(self) -> int:
        """How many inputs can be prepared at once."""
        return self._before.size

    def enter(self, run: Run) -> None:
        """Have a batch's inputs prepared, except those that were prepared before it was withdrawn."""
        slots = [
            _slot(part.task, index) for part in run.batch.parts for index in range(part.start, part.stop)
        ]
        with self._changed:
            run.slots = slots
            for place, slot in enumerate(slots):
                slot.run, slot.place = run, place
                if slot.stage == "ready":
                    run.bytes += slot.size
                elif slot.stage == "waiting":
                    slot.stage = "queued"
                    self._before.put(partial(self._prepare, slot))

    def stage(self, run: Run) -> None:
        """Have a batch staged as a whole while another one runs, if that is worth a thread."""
        model, batch = run.model, run.batch
        if self.stager.usual.seconds(model.name, batch.size) >= WORTH_A_THREAD_S:
            run.staging = Staging(partial(self._bring, model, batch))
            self._before.put(run.staging.work)

    def _bring(self, model: LoadedModel, batch: Batch) -> Sequence[Any]:
        self._moved()
        items = self.stager.bring(model, batch)
        self._moved()
        return items

    def staged(self, run: Run) -> Sequence[Any]:
        """Return an item or an error for each input of the running batch. For the device thread."""
        staging, run.staging = run.staging, None
        items = None if staging is None else staging.take()
        return self.stager.bring(run.model, run.batch) if items is None else items

    def leave(self, run: Run) -> None:
        """Stop preparing a batch that was withdrawn; prepared inputs are kept with their tasks.

        Up to PREPARED_BYTES are kept in total; other inputs, and what was staged, are prepared again later.
        """
        if run.staging is not None:
            run.staging.leave()
        with self._changed:
            for slot in run.slots or ():
                slot.run = None
                if slot.stage in ("queued", "aside"):
                    slot.stage = "waiting"
            self._strays.append(run)
            self._keeping.update(run.tasks)
            self._drop_beyond(PREPARED_BYTES)

    def _drop_beyond(self, most: int) -> None:
        for task in self._keeping:
            for slot in (task.prepared or {}).values():
                if slot.run is None and slot.stage == "ready":
                    most -= slot.size
                    if most < 0:
                        slot.item, slot.size, slot.stage = None, 0, "waiting"

    def strays(self) -> list[Batch]:
        """Return the withdrawn batches of which a thread still prepares an input, and may crash."""
        if self._strays:
            with self._changed:
                self._strays = [run for run in self._strays if _is_stray(run)]
        return [run.batch for run in self._strays]

    def take(self, run: Run, first: int, until: int) -> list[Any]:
        """Wait for the inputs ``first`` to ``until`` of the running batch; return their items or errors.

        Returns fewer, but at least one, if together they would take too much memory.
        """
        slots = run.slots or []
        with self._changed:
            run.first, run.until = first, until
            self._resume(run)
            run.missing = sum(slot.stage != "ready" for slot in slots[first:until])
            while run.missing and not (run.bytes >= PREPARED_BYTES and slots[first].stage == "ready"):
                self._changed.wait()
            stop = next((i for i in range(first, until) if slots[i].stage != "ready"), until)
            taken = slots[first:stop]
            run.first = stop
            for slot in taken:
                run.bytes -= slot.size
                slot.run = None  # breaks a reference cycle, which would keep the inputs in memory
                if slot.task.prepared is not None:
                    slot.task.prepared.pop(slot.index, None)
            self._resume(run)
        items = [slot.item for slot in taken]
        for slot in taken:
            slot.item = None
        return items

    def _resume(self, run: Run) -> None:
        """Queue the inputs again that were put aside, if there is memory now."""
        for slot in (run.slots or ())[run.first :]:
            if slot.stage == "aside" and not self._full(slot, run):
                slot.stage = "queued"
                self._before.put(partial(self._prepare, slot))

    def _prepare(self, slot: Slot) -> None:
        """Prepare one input, in a preparing thread."""
        with self._changed:
            run = slot.run
            if slot.stage != "queued" or run is None:
                return
            slot.stage = "aside" if self._full(slot, run) else "begun"
            if slot.stage == "aside":
                return
        self._moved()
        item = self._prepared(run, slot)
        size = size_of(item)
        with self._changed:
            slot.item, slot.size, slot.stage = item, size, "ready"
            run_now = slot.run
            if run_now is not None:
                run_now.bytes += size
                run_now.missing -= run_now.first <= slot.place < run_now.until
                if run_now.missing <= 0 or run_now.bytes >= PREPARED_BYTES:
                    self._changed.notify_all()
        self._moved()

    @staticmethod
    def _full(slot: Slot, run: Run) -> bool:
        return run.bytes >= PREPARED_BYTES and slot.place != run.first

    def _prepared(self, run: Run, slot: Slot) -> Any:
        task, value, clock = slot.task, slot.task.inputs[slot.index], self._deadline.clock
        if task.ended:
            return TaskRevoked("it was cancelled")
        begun = clock()
        item = self._limited(run, task, lambda: run.model.prepare([value]))
        name = run.model.name
        took, usual = clock() - begun, self.prepare_s.get(name)
        self.prepare_s[name] = took if usual is None else usual + (took - usual) / 16
        return item

    def _limited(self, run: Run, task: Task, call: Callable[[], Sequence[Any]]) -> Any:
        """Run a model's code for one input, under its task's limits; return its only value, or the error."""
        try:
            with working(run.work([task])):
                (made,) = self._deadline.run(task.soft_limit_s, task.hard_limit_s, call, about=[task])
        except GpuinferError as exc:
            return exc
        except BaseException as exc:  # anything that a model raises fails its task only
            error = InferenceError(described(exc))
            error.__cause__ = exc
            return error
        return made

    # -- after the device -----------------------------------------------------------------

    def finish(self, run: Run, outcomes: list[Any], done: Callable[[list[Any]], None]) -> None:
        """Finish each output separately, then call ``done`` with the outcomes.

        For the device thread, which waits here while an earlier batch is being finished.
        """
        self.begin_finishing()
        places = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        if not places:
            self._finished(outcomes, done)
            return
        tasks, left = run.tasks, _Left(len(places))

        def finish_one(place: int) -> None:
            outcomes[place] = self._finish_one(run, tasks[place], outcomes[place])
            self._moved()
            if left.last():
                self._finished(outcomes, done)

        for place in places:
            self._behind.put(partial(finish_one, place))

    def _finish_one(self, run: Run, task: Task, output: Any) -> Any:
        def call() -> Sequence[Any]:
            return run.model.finish([output], top_k=[task.top_k], encoding=[task.encoding])

        return self._limited(run, task, call)

    def _finished(self, outcomes: list[Any], done: Callable[[list[Any]], None]) -> None:
        done(outcomes)
        self.end_finishing()

    def begin_finishing(self) -> None:
        """Wait until no earlier batch is being finished. For the device thread."""
        self._finishing.acquire()

    def end_finishing(self) -> None:
        """Let the next batch be finished."""
        self._finishing.release()

    def behind(self, job: Callable[[], object]) -> None:
        """Have one thread finish a whole batch; the job must call ``end_finishing``."""
        self._behind.put(job)

    def close(self) -> None:
        """Let the threads end once their jobs are done."""
        self._before.close()
        self._behind.close()


class _Left:
    """Counts down, from any thread."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()

    def last(self) -> bool:
        """Count one down; True for the last one."""
        with self._lock:
            self._count -= 1
            return self._count == 0


def _is_stray(run: Run) -> bool:
    if run.staging is not None and run.staging.busy:
        return True
    return any(slot.stage == "begun" and slot.run is None for slot in run.slots or ())


def _slot(task: Task, index: int) -> Slot:
    """Return a task's slot for one of its inputs: the same one until the device takes the input."""
    if task.prepared is None:
        task.prepared = {}
    slot = task.prepared.get(index)
    if slot is None:
        slot = task.prepared[index] = Slot(task, index)
    return slot


def size_of(value: Any) -> int:
    """Estimate the bytes of memory that a prepared input uses."""
    total, left = 0, _COUNTED
    stack = [value]
    seen = set()
    while stack and left:
        one = stack.pop()
        left -= 1
        if id(one) in seen:
            continue
        seen.add(id(one))
        size = getattr(one, "nbytes", None)  # numpy, torch
        if isinstance(size, int):
            total += size
        elif isinstance(one, Mapping):
            stack += one.values()
        elif is_dataclass(one) and not isinstance(one, type):
            stack += (getattr(one, part.name, None) for part in fields(one))
        elif isinstance(one, list | tuple | set | frozenset):
            stack += one if len(one) <= left else list(one)[:left]
        elif hasattr(one, "getbands") and hasattr(one, "size"):  # PIL
            total += one.size[0] * one.size[1] * len(one.getbands())
        else:
            total += sys.getsizeof(one, 64)
    return total
