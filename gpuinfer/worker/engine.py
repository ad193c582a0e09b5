# SPDX-License-Identifier: Apache-2.0
"""The inference thread: takes one batch at a time and returns an outcome for each of its inputs."""

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

#: Seconds without a batch after which an idle worker's GPU is tried, and again, and again.
PROBE_EVERY_S = 5.0
#: A probe takes a millisecond. Seconds after which what waits behind one had better go elsewhere.
STALLED_AFTER_S = 1.0
#: Seconds that the thread's end is waited for while a probe runs: a GPU that hangs may never let go of it.
PROBE_PATIENCE_S = 5.0
#: Batches that are in the engine at once: one being finished, one on the device, one being prepared.
IN_ENGINE = 3


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that has run."""

    batch: Batch
    #: One entry an input, in the batch's order: a result, an error, or RunAlone.
    outcomes: list[Any]
    seconds: float
    #: What ended the thread, when it cannot go on (a lost GPU).
    fatal: GpuinferError | None = None
    #: How many of the seconds the device waited for inputs.
    waited_s: float = 0.0

    @property
    def complete(self) -> bool:
        """True when no task of the batch has to come back: each has all its results."""
        if any(issubclass(kind, Exception) for kind in set(map(type, self.outcomes))):
            return False
        return all(part.stop == len(part.task.inputs) for part in self.batch.parts)


class Engine:
    """Runs batches on a thread of its own, one after another; between them it tries its GPU once in a while.

    ``wake`` is called in that thread, or one that finishes, whenever something was added to ``done``, unless
    somebody stands there and waits; ``probed`` after each probe.
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
        #: What was handed over and not collected, the oldest first; for the main thread.
        self._runs: list[Run] = []
        #: When a pass, a probe, or a step of an input ended or began last, on the monotonic clock: what the
        #: watchdog looks at. And when the batch that runs began, or its last pass.
        self.moved_at = self.began_at = time.monotonic()
        self.pipeline = Pipeline(deadline, threads or cores(), self._moved, self._broke)
        #: What rendering outputs takes that no code of a model finishes.
        self._rendering = Usual()
        #: A model whose GPU is tried while the worker is idle; None on a CPU, which does not get lost.
        self._tried = next((model for model in models.values() if model.device != "cpu"), None)
        #: True while a probe runs, and for good after one that failed: nothing is claimed or begun.
        self.probing = False
        #: What a probe found, when the GPU cannot go on; or what has ended a thread: the process must end.
        self.failed: GpuinferError | None = None
        self._told_full = False
        self._awaited = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def limit(self, model: str) -> int:
        """Return the model's largest batch; one that did not fit has made it smaller for a while."""
        return self._sizes.limit(model)

    # -- for the main thread --------------------------------------------------------------

    @property
    def current(self) -> Batch | None:
        """The batch that runs or is about to: the oldest that was handed over and not collected."""
        return self._runs[0].batch if self._runs else None

    @property
    def batches(self) -> list[Batch]:
        """All that were handed over and not collected, the oldest first."""
        return [run.batch for run in self._runs]

    @property
    def on_account(self) -> list[Batch]:
        """What a death is charged to: what was handed over, and what was withdrawn while it was prepared."""
        return [*self.batches, *self.pipeline.strays()]

    @property
    def ahead(self) -> Batch | None:
        """The batch behind the one that runs, as long as the device has not begun it."""
        run = self._runs[-1] if len(self._runs) > 1 else None
        return run.batch if run is not None and not run.gate.locked() else None

    def prepares(self, model: str) -> bool:
        """Tell whether the model's inputs are prepared before the device takes them."""
        return self._models[model].prepares

    @property
    def has_room(self) -> bool:
        """True when a batch might be handed over now, to be prepared or staged behind what runs."""
        return not self._runs or (self.ahead is None and len(self._runs) < IN_ENGINE)

    def takes(self, batch: Batch) -> bool:
        """Tell whether a batch may be handed over now.

        Behind another one it must be full, or have something to prepare: else it gathers until the device is
        free.
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
        """Hand a batch over, as ``takes`` allows."""
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
        """Take back the batch that is ahead; None when there is none, or the device has begun it."""
        run = self._runs[-1] if len(self._runs) > 1 else None
        if run is None or not run.gate.acquire(blocking=False):
            return None
        self.pipeline.leave(run)
        self._runs.remove(run)
        return run.batch

    def collected(self, done: Done) -> None:
        """A batch is out of the engine: its outcomes are being distributed."""
        self._runs = [run for run in self._runs if run.batch is not done.batch]

    @property
    def running_s(self) -> float:
        """Seconds since the batch that runs was handed over, or its last pass began; 0 when none runs."""
        return time.monotonic() - self.began_at if self._runs else 0.0

    def probe(self) -> None:
        """Have the GPU tried when it has been idle for some seconds: else nobody would find out."""
        if self._tried is None or self._runs or self.probing:
            return
        now = time.monotonic()
        if now - self.moved_at >= PROBE_EVERY_S:
            self.probing, self.moved_at = True, now
            self._jobs.put(partial(self._probe, self._tried))

    @property
    def stalled(self) -> bool:
        """True when a probe takes so long that nothing should wait here for its end."""
        return self.probing and time.monotonic() - self.moved_at > STALLED_AFTER_S

    def wait(self, timeout_s: float) -> Done | None:
        """Wait for the batch that runs, and take it; None when it takes longer."""
        done: Done | None = None
        self._awaited = True
        with suppress(queue.Empty):
            done = self.done.get(timeout=timeout_s)
        self._awaited = False
        if done is None and not self.done.empty():  # it came just now, and perhaps without a wake
            done = self.done.get()
        if not self.done.empty():  # and so has the next
            self.wake()
        return done

    def next_done(self) -> Done | None:
        """Wait for the batch that runs, and take it; None when a thread has failed and it never ends."""
        while True:
            with suppress(queue.Empty):
                return self.done.get(timeout=1.0)
            if self.failed is not None:
                return None

    def close(self) -> None:
        """End the thread after the batch that runs; one whose probe hangs is left behind."""
        self._tried = None
        self._jobs.put(None)
        self._thread.join(PROBE_PATIENCE_S if self.probing or self.failed is not None else None)
        self.pipeline.close()  # not before: the batch that runs needs it

    def _probe(self, model: LoadedModel) -> None:
        """Try the GPU. One that is full is not lost: another program holds its memory, and that may pass."""
        try:
            model.probe()
        except DeviceOutOfMemory as exc:
            if not self._told_full:
                log.warning("gpu_full", reason=str(exc), hint="nvidia-smi shows who holds its memory")
            self._told_full = True
        except GpuinferError as exc:
            self.failed = exc
        self.probing = self.failed is not None
        self.probed()

    def _broke(self, exc: BaseException) -> None:
        """A mistake of ours, or nonsense of a model's: what waits for this thread would do so for ever."""
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
        self.pipeline.begin_finishing()  # batches end in their order
        if self._jobs.empty() or not self._worth_a_thread(run):
            self._conclude(run, outcomes, started)
        else:
            self.pipeline.behind(lambda: self._conclude(run, outcomes, started, seconds))

    def _worth_a_thread(self, run: Run) -> bool:
        """Tell whether the device should not wait until a batch's outputs are rendered."""
        return self._rendering.seconds(run.model.name, run.batch.size) >= WORTH_A_THREAD_S

    def _conclude(self, run: Run, outcomes: list[Any], started: float, seconds: float | None = None) -> None:
        """Render a batch's outputs, and end it. ``seconds``: those of the device, where it has gone on."""
        rendered = self._attempt(run, started, lambda: self._rendered(run, outcomes))
        if rendered is not None:
            self._end(run, rendered, time.monotonic() - started if seconds is None else seconds)
        self.pipeline.end_finishing()

    def _attempt(self, run: Run, started: float, call: Callable[[], list[Any]]) -> list[Any] | None:
        """Return what ``call`` does. None: it has failed, and the batch has ended with that."""
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
        """Put a batch's outcomes where the main thread finds them."""
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
        """Run the items; an error among them, or a cancelled task's, never reaches the device."""
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
        """Render what has an output, in place and all at once. Raises DeviceError."""
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
