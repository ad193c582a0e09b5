# SPDX-License-Identifier: Apache-2.0
"""The inference thread: runs one batch at a time and returns an outcome for each of its inputs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpuinfer.errors import DeviceOutOfMemory, GpuinferError, InferenceError, TaskRevoked
from gpuinfer.log import get_logger
from gpuinfer.models.blame import described
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.sections import Errors
from gpuinfer.worker import failures
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.crew import cores
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.passes import Passes
from gpuinfer.worker.pipeline import Pipeline, Run
from gpuinfer.worker.sizes import Sizes
from gpuinfer.worker.staging import WORTH_A_THREAD_S, Usual, each, values_of
from gpuinfer.worker.task import Task

log = get_logger(__name__)

#: Seconds between two probes of an idle worker's GPU.
PROBE_EVERY_S = 5.0
#: Seconds of one probe, which normally takes a millisecond, after which waiting tasks are returned.
STALLED_AFTER_S = 1.0
#: Seconds to wait for the thread to end while a probe runs: on a GPU that hangs it may never end.
PROBE_PATIENCE_S = 5.0
#: Maximum number of batches in the engine: one being finished, one on the device, one being prepared.
IN_ENGINE = 3


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that has run."""

    batch: Batch
    #: One entry per input, in the batch's order: a result, an error, or RunAlone.
    outcomes: list[Any]
    seconds: float
    #: The error, if the device cannot go on (a lost GPU).
    fatal: GpuinferError | None = None
    #: The part of ``seconds`` for which the device waited for inputs.
    waited_s: float = 0.0

    @property
    def complete(self) -> bool:
        """True when every task of the batch has all its results, so that none must run again."""
        if any(issubclass(kind, Exception) for kind in set(map(type, self.outcomes))):
            return False
        return all(part.stop == len(part.task.inputs) for part in self.batch.parts)


class Engine:
    """Runs batches on its own thread, one after another; while idle, it probes its GPU every few seconds.

    ``wake`` is called, in that thread or in one that finishes outputs, whenever a batch was added to
    ``done``, unless ``wait`` is waiting for it; ``probed`` is called after each probe.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        sizes: Sizes,
        deadline: Deadline,
        wake: Callable[[], None],
        *,
        threads: int = 0,
        errors: Errors = "full",
    ) -> None:
        self._models = models
        self._sizes = sizes
        self._deadline = deadline
        self._errors: Errors = errors
        self.wake = self.probed = wake
        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Run | Callable[[], None] | None] = queue.SimpleQueue()
        #: The batches that were submitted and not collected, the oldest first; for the main thread.
        self._runs: list[Run] = []
        #: ``moved_at``, for the watchdog: when a pass, a probe, or a step of an input last began or ended.
        #: ``began_at``: when the running batch, or its last pass, began. Both on the monotonic clock.
        self.moved_at = self.began_at = time.monotonic()
        self.pipeline = Pipeline(deadline, threads or cores(), self._moved, self._broke)
        #: How long rendering takes for models without their own code for that.
        self._rendering = Usual()
        #: A model whose GPU is probed while the worker is idle; None on a CPU, which cannot be lost.
        self._tried = next((model for model in models.values() if model.device != "cpu"), None)
        #: True while a probe runs, and for good after one has failed: nothing is claimed or begun then.
        self.probing = False
        #: Why the process must end: a probe found the GPU lost, or a thread of the worker has failed.
        self.failed: GpuinferError | None = None
        self._told_full = False
        self._awaited = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def limit(self, model: str) -> int:
        """Return the model's largest batch; smaller for a while after a batch did not fit in memory."""
        return self._sizes.limit(model)

    # -- for the main thread --------------------------------------------------------------

    @property
    def current(self) -> Batch | None:
        """The batch that runs or is about to: the oldest that was submitted and not collected."""
        return self._runs[0].batch if self._runs else None

    @property
    def batches(self) -> list[Batch]:
        """All batches that were submitted and not collected, the oldest first."""
        return [run.batch for run in self._runs]

    @property
    def chargeable(self) -> list[Batch]:
        """The batches to charge a crash to: ``batches``, and withdrawn ones that a thread still prepares."""
        return [*self.batches, *self.pipeline.strays()]

    @property
    def ahead(self) -> Batch | None:
        """The batch behind the running one, as long as the device has not begun it."""
        run = self._runs[-1] if len(self._runs) > 1 else None
        return run.batch if run is not None and not run.gate.locked() else None

    def prepares(self, model: str) -> bool:
        """Tell whether other threads prepare the model's inputs before the device takes them."""
        return self._models[model].prepares

    @property
    def has_room(self) -> bool:
        """True when a batch may be submitted now, to be prepared or staged while another runs."""
        return not self._runs or (self.ahead is None and len(self._runs) < IN_ENGINE)

    def takes(self, batch: Batch) -> bool:
        """Tell whether a batch may be submitted now.

        Behind another one it must be full, or have inputs to prepare; otherwise it collects tasks until the
        device is free.
        """
        if not self._runs:
            return True
        if not self.has_room:
            return False
        model = self._models[batch.model]
        return batch.size >= self.limit(batch.model) or (
            model.prepares and model.prepares_these(values_of(batch))
        )

    def submit(self, batch: Batch) -> None:
        """Add a batch; ``takes`` must have allowed it."""
        run = Run(batch, self._models[batch.model])
        if not self._runs:
            self._began()
        self._runs.append(run)
        if run.model.prepares and run.model.prepares_these(run.values):
            self.pipeline.enter(run)
        elif len(self._runs) > 1:
            self.pipeline.stage(run)
        self._jobs.put(run)

    def withdraw(self) -> Batch | None:
        """Take back the batch behind the running one; None if there is none, or the device has begun it."""
        run = self._runs[-1] if len(self._runs) > 1 else None
        if run is None or not run.gate.acquire(blocking=False):
            return None
        self.pipeline.leave(run)
        self._runs.remove(run)
        return run.batch

    def collected(self, done: Done) -> None:
        """Remove a batch whose outcomes were taken from ``done``."""
        self._runs = [run for run in self._runs if run.batch is not done.batch]

    @property
    def running_s(self) -> float:
        """Seconds since the running batch, or its last pass, began; 0 when none runs."""
        return time.monotonic() - self.began_at if self._runs else 0.0

    def probe(self) -> None:
        """Have the GPU probed if it has been idle for some seconds: else nothing would notice its loss."""
        if self._tried is None or self._runs or self.probing:
            return
        now = time.monotonic()
        if now - self.moved_at >= PROBE_EVERY_S:
            self.probing, self.moved_at = True, now
            self._jobs.put(partial(self._probe, self._tried))

    @property
    def stalled(self) -> bool:
        """True when a probe takes so long that no task should wait here until it ends."""
        return self.probing and time.monotonic() - self.moved_at > STALLED_AFTER_S

    def wait(self, timeout_s: float) -> Done | None:
        """Wait for the running batch and return it; None if it takes longer than ``timeout_s``."""
        done: Done | None = None
        self._awaited = True
        with suppress(queue.Empty):
            done = self.done.get(timeout=timeout_s)
        self._awaited = False
        if done is None and not self.done.empty():  # it ended just now, and nothing may have called ``wake``
            done = self.done.get()
        if not self.done.empty():  # the same for the next batch
            self.wake()
        return done

    def next_done(self) -> Done | None:
        """Wait for the running batch and return it; None if a thread has failed, so that it never ends."""
        while True:
            with suppress(queue.Empty):
                return self.done.get(timeout=1.0)
            if self.failed is not None:
                return None

    def close(self) -> None:
        """End the thread after the running batch. A thread whose probe hangs is abandoned."""
        self._tried = None
        self._jobs.put(None)
        self._thread.join(PROBE_PATIENCE_S if self.probing or self.failed is not None else None)
        self.pipeline.close()  # only now: the running batch needs it

    def _probe(self, model: LoadedModel) -> None:
        """Probe the GPU. A full one is not lost: another program may use its memory only for a while."""
        try:
            model.probe()
        except DeviceOutOfMemory as exc:
            if not self._told_full:
                log.warning("gpu_full", reason=str(exc), hint="nvidia-smi shows who uses its memory")
            self._told_full = True
        except GpuinferError as exc:
            self.failed = exc
        self.probing = self.failed is not None
        self.probed()

    def _broke(self, exc: BaseException) -> None:
        """Fail the worker after an unexpected error in a thread: its batch would never end."""
        log.critical("thread_failed", thread=threading.current_thread().name, exc_info=exc)
        self.failed = GpuinferError(f"a thread of the worker has failed: {type(exc).__name__}")
        self.probed()

    # -- the device thread ----------------------------------------------------------------

    def _moved(self) -> None:
        self.moved_at = time.monotonic()

    def _began(self) -> None:
        self.moved_at = self.began_at = time.monotonic()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not isinstance(job, Run):
                    job()
                elif job.gate.acquire(blocking=False):  # else it was withdrawn
                    self._run_batch(job)
            except BaseException as exc:
                self._broke(exc)
            del job

    def _run_batch(self, run: Run) -> None:
        self._began()
        started = self.began_at
        outcomes = self._attempt(run, started, lambda: self._forward(run))
        if outcomes is None:
            return
        seconds = time.monotonic() - started
        if run.model.finishes:
            self.pipeline.finish(run, outcomes, lambda ended: self._end(run, ended, seconds))
            return
        self.pipeline.begin_finishing()  # batches end in the order in which they began
        if self._jobs.empty() or not self._worth_a_thread(run):
            self._conclude(run, outcomes, started)
        else:
            self.pipeline.behind(lambda: self._conclude(run, outcomes, started, seconds))

    def _worth_a_thread(self, run: Run) -> bool:
        """Tell whether another thread should render a batch's outputs, as the device would wait too long."""
        return self._rendering.seconds(run.model.name, run.batch.size) >= WORTH_A_THREAD_S

    def _conclude(self, run: Run, outcomes: list[Any], started: float, seconds: float | None = None) -> None:
        """Render a batch's outputs, and end it.

        ``seconds``: the device's time, if it runs the next batch meanwhile; None: rendering counts as well.
        """
        rendered = self._attempt(run, started, lambda: self._rendered(run, outcomes))
        if rendered is not None:
            self._end(run, rendered, time.monotonic() - started if seconds is None else seconds)
        self.pipeline.end_finishing()

    def _attempt(self, run: Run, started: float, call: Callable[[], list[Any]]) -> list[Any] | None:
        """Return the result of ``call``. None: it has failed, and the batch has ended with its error."""
        try:
            return call()
        except GpuinferError as exc:  # the device itself failed
            fatal, outcomes = exc, list[Any]()
        except BaseException as exc:
            batch = run.batch
            ids = [task.id for task in batch.tasks]
            log.exception("batch_failed", model=batch.model, batch_size=batch.size, task_ids=ids)
            fatal, outcomes = None, [InferenceError(described(exc))] * batch.size
        self._end(run, outcomes, time.monotonic() - started, fatal)
        return None

    def _end(self, run: Run, outcomes: list[Any], seconds: float, fatal: GpuinferError | None = None) -> None:
        """Queue a batch's outcomes for the main thread."""
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            outcomes = failures.told(run.model.name, run.tasks, outcomes, self._errors)
        self.done.put(Done(run.batch, outcomes, seconds, fatal, run.waited_s))
        if not self._awaited:
            self.wake()

    def _forward(self, run: Run) -> list[Any]:
        """Return an output or an error for each input. Raises DeviceError when the device cannot go on."""
        model, tasks = run.model, run.tasks
        passes = Passes(model, run.batch, run.work, self._deadline, self._sizes, self._began)
        if run.slots is None:
            asked, ahead = time.monotonic(), run.staging is not None
            brought = self.pipeline.staged(run)
            if ahead:
                run.waited_s = time.monotonic() - asked
                passes.waited(run.waited_s)
            return self._answered(passes, brought, tasks)
        outcomes: list[Any] = []
        while len(outcomes) < len(tasks):
            first = len(outcomes)
            until = min(len(tasks), first + self.limit(model.name))
            asked = time.monotonic()
            items = self.pipeline.take(run, first, until)
            waited = time.monotonic() - asked
            passes.waited(waited)
            run.waited_s += waited
            outcomes += self._answered(passes, items, tasks[first : first + len(items)])
        return outcomes

    @staticmethod
    def _answered(passes: Passes, items: Sequence[Any], tasks: Sequence[Task]) -> list[Any]:
        """Run the items, except those that are errors or belong to a cancelled task."""
        good = [i for i, item in enumerate(items) if not isinstance(item, Exception) and not tasks[i].ended]
        if len(good) == len(items):
            return passes.run(items, tasks)
        ran = passes.run([items[i] for i in good], [tasks[i] for i in good])
        outcomes = [
            item if isinstance(item, Exception) else TaskRevoked("it was cancelled") for item in items
        ]
        for i, outcome in zip(good, ran, strict=True):
            outcomes[i] = outcome
        return outcomes

    def _rendered(self, run: Run, outcomes: list[Any]) -> list[Any]:
        """Render all outputs at once and put them in place; errors stay. Raises DeviceError."""
        began = time.monotonic()
        answered = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        tasks = run.tasks
        run.model.land([outcomes[i] for i in answered])

        def finish(some: Sequence[int]) -> Sequence[Any]:
            return run.model.finish(
                [outcomes[i] for i in some],
                top_k=[tasks[i].top_k for i in some],
                encoding=[tasks[i].encoding for i in some],
            )

        for i, value in zip(answered, each(finish, answered), strict=True):
            outcomes[i] = value
        self._rendering.note(run.model.name, len(outcomes), time.monotonic() - began)
        return outcomes
