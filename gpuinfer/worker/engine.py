# SPDX-License-Identifier: Apache-2.0
"""The inference thread: takes one batch at a time and returns an outcome for each of its inputs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gpuinfer.errors import (
    DeviceOutOfMemory,
    GpuinferError,
    InferenceError,
    SoftTimeLimitExceeded,
)
from gpuinfer.log import get_logger
from gpuinfer.models.loader import LoadedModel
from gpuinfer.models.outputs import render_batch
from gpuinfer.models.tensors import Item, decode_batch
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.deadline import Deadline

log = get_logger(__name__)


class RunAlone(Exception):
    """The outcome of an input whose batch passed its soft limit as a whole: it must run by itself."""


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
    def smooth(self) -> bool:
        """True when no task of the batch has to come back: each has all its results."""
        ended = all(part.stop == len(part.work.inputs) for part in self.batch.parts)
        return ended and not any(isinstance(outcome, Exception) for outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a batch must have ended, on the monotonic clock: halves of it share its time."""

    soft_at: float
    hard_at: float

    @classmethod
    def of(cls, batch: Batch) -> Limits:
        """Start the batch's limits now."""
        now = time.monotonic()
        return cls(now + batch.soft_limit_s, now + batch.hard_limit_s)

    def left(self) -> tuple[float, float]:
        """Return the seconds left until the soft and the hard limit; a thousandth at least."""
        now = time.monotonic()
        return max(0.001, self.soft_at - now), max(0.001, self.hard_at - now)


class Engine:
    """Runs batches on a thread of its own, one after another.

    ``sizes`` gives each model's largest batch that is known to fit its device; ``wake`` is called in
    that thread whenever something was added to ``done``, unless somebody stands there and waits.
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
        self.wake = wake
        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        #: The batch that is running or about to; set by the main thread.
        self.current: Batch | None = None
        #: When a pass began last, on the monotonic clock: what the watchdog looks at.
        self.moved_at = time.monotonic()
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
        """End the thread after the batch that runs."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._jobs.get()) is not None:
            started = time.monotonic()
            fatal: GpuinferError | None = None
            try:
                outcomes = self._outcomes(batch)
            except GpuinferError as exc:  # the device itself failed
                outcomes, fatal = [], exc
            except Exception as exc:
                ids = [work.id for work in batch.works]
                log.exception("batch_failed", model=batch.model, batch_size=batch.size, task_ids=ids)
                outcomes = [InferenceError(f"{type(exc).__name__}: {exc}")] * batch.size
            seconds = time.monotonic() - started
            self.done.put(Done(batch, outcomes, seconds, fatal))
            if not self._awaited:
                self.wake()

    def _outcomes(self, batch: Batch) -> list[Any]:
        """Decode, run and render a batch. Raises DeviceError when the device cannot go on."""
        model = self._models[batch.model]
        inputs = [value for part in batch.parts for value in part.work.inputs[part.start : part.stop]]
        decoded = decode_batch(model.manifest, inputs)
        outcomes: list[Any] = list(decoded)
        good = [i for i, item in enumerate(decoded) if not isinstance(item, GpuinferError)]
        wanted: list[Any] = [decoded[i] for i in good]
        ran = self._forward(model, batch, wanted, Limits.of(batch))
        answers = [(i, out) for i, out in zip(good, ran, strict=True) if not isinstance(out, Exception)]
        for i, out in zip(good, ran, strict=True):
            outcomes[i] = out
        if answers:
            works = [part.work for part in batch.parts for _ in range(part.start, part.stop)]
            rendered = render_batch(
                model.manifest,
                [out for _, out in answers],
                top_k=[works[i].top_k for i, _ in answers],
                encoding=[works[i].encoding for i, _ in answers],
            )
            for (i, _), value in zip(answers, rendered, strict=True):
                outcomes[i] = value
        return outcomes

    def _forward(self, model: LoadedModel, batch: Batch, items: Sequence[Item], until: Limits) -> list[Any]:
        """Run items in as few passes as fit; a pass that fails is halved until the culprit stands alone."""
        if not items:
            return []
        limit = self.limit(model.name)
        if len(items) > limit:
            rest = self._forward(model, batch, items[:limit], until)
            return rest + self._forward(model, batch, items[limit:], until)
        memory = False
        self.moved_at = time.monotonic()
        try:
            return self._deadline.run(*until.left(), lambda: list(model.forward(items)))
        except DeviceOutOfMemory as exc:
            if len(items) == 1:
                return [exc]
            memory = True
            model.release_cache()
        except SoftTimeLimitExceeded as exc:
            if len(items) == 1:
                return [exc]
            if len(batch.parts) > 1:
                return [RunAlone()] * len(items)
            until = Limits.of(batch)  # one task's slice: each half has the limit that the whole had
        except InferenceError as exc:
            if len(items) == 1:
                return [exc]
        half = len(items) // 2
        outcomes = self._forward(model, batch, items[:half], until)
        outcomes += self._forward(model, batch, items[half:], until)
        if memory and not any(isinstance(outcome, DeviceOutOfMemory) for outcome in outcomes):
            self._remember(model.name, half)
        return outcomes

    def _remember(self, name: str, size: int) -> None:
        """Make a model's batches smaller for good: halves fitted where the whole did not.

        An input that does not fit even alone says nothing about the size of a batch.
        """
        self._sizes[name] = max(1, min(size, self._sizes[name]))
        log.warning("batch_size_reduced", model=name, max_batch_size=self._sizes[name])
