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

from gpuinfer.errors import (
    DeviceOutOfMemory,
    GpuinferError,
    InferenceError,
    SoftTimeLimitExceeded,
)
from gpuinfer.log import get_logger
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.outputs import render_batch
from gpuinfer.models.tensors import Item, decode_batch
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.deadline import Deadline

log = get_logger(__name__)

#: Seconds without a batch after which an idle worker's GPU is tried, and again, and again.
PROBE_EVERY_S = 5.0
#: A probe takes a millisecond. Seconds after which what waits behind one had better go elsewhere.
STALLED_AFTER_S = 1.0
#: Seconds that the thread's end is waited for while a probe runs: a GPU that hangs may never let go of it.
PROBE_PATIENCE_S = 5.0


class RunAlone(Exception):
    """The outcome of an input whose batch passed its soft limit as a whole: its task must run by itself.

    Not here and now: what is urgent goes in between.
    """


@dataclass(frozen=True, slots=True)
class _Ran:
    """What came of some items of a batch."""

    outcomes: list[Any]
    #: True when the device had too little memory for them at once.
    memory: bool = False
    #: The largest number that fits the device, where that has shown.
    fits: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that has run."""

    batch: Batch
    #: One entry an input, in the batch's order: a result, an error, or RunAlone.
    outcomes: list[Any]
    seconds: float
    #: What ended the thread, when it cannot go on (a lost GPU).
    fatal: GpuinferError | None = None

    @property
    def complete(self) -> bool:
        """True when no task of the batch has to come back: each has all its results."""
        ended = all(part.stop == len(part.task.inputs) for part in self.batch.parts)
        return ended and not any(isinstance(outcome, Exception) for outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a batch must have ended, on the monotonic clock: halves of it share its time."""

    soft_at: float
    hard_at: float
    #: True when it is the time of several tasks.
    shared: bool

    @classmethod
    def of(cls, batch: Batch) -> Limits:
        """Start the batch's limits now."""
        now = time.monotonic()
        return cls(now + batch.soft_limit_s, now + batch.hard_limit_s, batch.shared)

    def left(self) -> tuple[float, float]:
        """Return the seconds left until the soft and the hard limit; a thousandth at least."""
        now = time.monotonic()
        return max(0.001, self.soft_at - now), max(0.001, self.hard_at - now)


class Engine:
    """Runs batches on a thread of its own, one after another; between them it tries its GPU once in a while.

    ``sizes`` gives each model's largest batch that is known to fit its device; ``wake`` is called in
    that thread whenever something was added to ``done``, unless somebody stands there and waits, and
    ``probed`` after each probe.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        sizes: Mapping[str, int],
        deadline: Deadline,
        wake: Callable[[], None],
    ) -> None:
        self._models = models
        self._sizes = dict(sizes)
        self._deadline = deadline
        self.wake = self.probed = wake
        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Batch | Callable[[], None] | None] = queue.SimpleQueue()
        #: The batch that is running or about to; set by the main thread.
        self.current: Batch | None = None
        #: When a pass or a probe began last, on the monotonic clock: what the watchdog looks at.
        self.moved_at = time.monotonic()
        #: A model whose GPU is tried while the worker is idle; None on a CPU, which does not get lost.
        self._tried = next((model for model in models.values() if model.device != "cpu"), None)
        #: True while a probe runs, and for good after one that failed: nothing is claimed or begun.
        self.probing = False
        #: What a probe found, when the GPU cannot go on.
        self.failed: GpuinferError | None = None
        self._told_full = False
        self._awaited = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def limit(self, model: str) -> int:
        """Return the model's largest batch; one that did not fit has made it smaller for good."""
        return self._sizes[model]

    def submit(self, batch: Batch) -> None:
        """Hand a batch over. The thread must be idle."""
        self.current = batch
        self.moved_at = time.monotonic()
        self._jobs.put(batch)

    @property
    def running_s(self) -> float:
        """Seconds since the batch that runs was handed over, or its last pass began; 0 when none runs."""
        return time.monotonic() - self.moved_at if self.current is not None else 0.0

    def probe(self) -> None:
        """Have the GPU tried when it has been idle for some seconds: else nobody would find out."""
        if self._tried is None or self.current is not None or self.probing:
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
        return done

    def close(self) -> None:
        """End the thread after the batch that runs; one whose probe hangs is left behind."""
        self._tried = None
        self._jobs.put(None)
        self._thread.join(PROBE_PATIENCE_S if self.probing else None)

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

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, Batch):
                self._run_batch(job)
            else:
                job()

    def _run_batch(self, batch: Batch) -> None:
        started = time.monotonic()
        fatal: GpuinferError | None = None
        try:
            outcomes = self._outcomes(batch)
        except GpuinferError as exc:  # the device itself failed
            outcomes, fatal = [], exc
        except Exception as exc:
            ids = [task.id for task in batch.tasks]
            log.exception("batch_failed", model=batch.model, batch_size=batch.size, task_ids=ids)
            outcomes = [InferenceError(f"{type(exc).__name__}: {exc}")] * batch.size
        seconds = time.monotonic() - started
        self.done.put(Done(batch, outcomes, seconds, fatal))
        if not self._awaited:
            self.wake()

    def _outcomes(self, batch: Batch) -> list[Any]:
        """Decode, run and render a batch. Raises DeviceError when the device cannot go on."""
        model = self._models[batch.model]
        tasks = [part.task for part in batch.parts for _ in range(part.start, part.stop)]
        inputs = [value for part in batch.parts for value in part.task.inputs[part.start : part.stop]]
        outcomes: list[Any] = _each(lambda values: decode_batch(model.manifest, values), inputs)
        good = [i for i, item in enumerate(outcomes) if not isinstance(item, Exception)]
        ran = self._forward(model, batch, [outcomes[i] for i in good])
        for i, out in zip(good, ran, strict=True):
            outcomes[i] = out
        answered = [i for i in good if not isinstance(outcomes[i], Exception)]

        def render(some: Sequence[int]) -> Sequence[Any]:
            return render_batch(
                model.manifest,
                [outcomes[i] for i in some],
                top_k=[tasks[i].top_k for i in some],
                encoding=[tasks[i].encoding for i in some],
            )

        for i, value in zip(answered, _each(render, answered), strict=True):
            outcomes[i] = value
        return outcomes

    def _forward(self, model: LoadedModel, batch: Batch, items: Sequence[Item]) -> list[Any]:
        """Run items in as few passes as fit; one outcome for each."""
        outcomes: list[Any] = []
        until = Limits.of(batch)
        while len(outcomes) < len(items):
            some = items[len(outcomes) : len(outcomes) + self.limit(model.name)]
            ran = self._halve(model, some, until)
            outcomes += ran.outcomes
            if ran.fits is not None and len(some) > 2:  # of two, one may be larger than any other
                self._remember(model.name, ran.fits)
        return outcomes

    def _halve(self, model: LoadedModel, items: Sequence[Item], until: Limits) -> _Ran:
        """Run items in one pass; one that fails is halved until the culprit stands alone."""
        memory = False
        self.moved_at = time.monotonic()
        try:
            return _Ran(self._deadline.run(*until.left(), lambda: list(model.forward(items))))
        except SoftTimeLimitExceeded as exc:
            alone = len(items) == 1 and not until.shared  # else it was perhaps another's time, or limit
            return _Ran([exc] if alone else [RunAlone()] * len(items))
        except DeviceOutOfMemory as exc:
            model.release_cache()
            memory = True
            if len(items) == 1:
                return _Ran([exc], memory=True)
        except InferenceError as exc:
            if len(items) == 1:
                return _Ran([exc])
        half = len(items) // 2
        first = self._halve(model, items[:half], until)
        second = self._halve(model, items[half:], until)
        fits = min((ran.fits for ran in (first, second) if ran.fits is not None), default=None)
        if memory and not first.memory and not second.memory:
            fits = half
        elif memory and not (first.fits and second.fits):  # it was one large item, not their number
            fits = None
        return _Ran(first.outcomes + second.outcomes, memory or first.memory or second.memory, fits)

    def _remember(self, name: str, size: int) -> None:
        """Make a model's batches smaller for good: halves fitted where the whole did not."""
        if size < self._sizes[name]:
            self._sizes[name] = size
            log.warning("batch_size_reduced", model=name, max_batch_size=size)


def _each(call: Callable[[Sequence[Any]], Sequence[Any]], values: Sequence[Any]) -> list[Any]:
    """Call for all values at once; if that fails, for each by itself, so that only the culprit fails."""
    try:
        return list(call(values)) if values else []
    except Exception as exc:
        if len(values) == 1:
            return [exc if isinstance(exc, GpuinferError) else InferenceError(f"{type(exc).__name__}: {exc}")]
        return [outcome for value in values for outcome in _each(call, [value])]
