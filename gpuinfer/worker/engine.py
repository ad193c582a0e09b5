# SPDX-License-Identifier: Apache-2.0
"""The inference thread: takes one batch at a time and returns an outcome for each of its inputs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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


class Engine:
    """Runs batches on a thread of its own, one after another.

    ``wake`` is called in that thread whenever something was added to ``done``; ``most`` bounds every
    model's batch (0: not at all).
    """

    def __init__(
        self, models: Mapping[str, LoadedModel], deadline: Deadline, wake: Callable[[], None], most: int = 0
    ) -> None:
        self._models = models
        self._deadline = deadline
        self._most = most
        self.wake = wake
        #: Largest batch that is known to fit into the device's memory, by model.
        self.safe_size: dict[str, int] = {}
        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        #: The batch that is running or about to; set by the main thread.
        self.current: Batch | None = None
        #: Seconds the thread has spent on batches.
        self.busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def limit(self, model: str) -> int:
        """Return the model's largest batch: its manifest's, less what did not fit."""
        manifest = self._models[model].manifest
        most = manifest.max_batch_size if manifest.batchable else 1
        if self._most:
            most = min(most, self._most)
        return min(most, self.safe_size.get(model, most))

    def submit(self, batch: Batch) -> None:
        """Hand a batch over. The thread must be idle."""
        self.current = batch
        self._jobs.put(batch)

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
                log.exception("batch_failed", model=batch.model, batch_size=batch.size)
                outcomes = [InferenceError(f"{type(exc).__name__}: {exc}")] * batch.size
            seconds = time.monotonic() - started
            self.busy_s += seconds
            self.done.put(Done(batch, outcomes, seconds, fatal))
            self.wake()

    def _outcomes(self, batch: Batch) -> list[Any]:
        """Decode, run and render a batch. Raises DeviceError when the device cannot go on."""
        model = self._models[batch.model]
        inputs = [value for part in batch.parts for value in part.work.inputs[part.start : part.stop]]
        decoded = decode_batch(model.manifest, inputs)
        outcomes: list[Any] = list(decoded)
        good = [i for i, item in enumerate(decoded) if not isinstance(item, GpuinferError)]
        ran = self._forward(model, batch, [decoded[i] for i in good])  # type: ignore[misc]  # errors are filtered out
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

    def _forward(self, model: LoadedModel, batch: Batch, items: Sequence[Item]) -> list[Any]:
        """Run items in as few passes as fit; a pass that fails is halved until the culprit stands alone."""
        if not items:
            return []
        limit = self.limit(model.name)
        if len(items) > limit:
            return self._forward(model, batch, items[:limit]) + self._forward(model, batch, items[limit:])
        try:
            with self._deadline.guard(batch.soft_limit_s, batch.hard_limit_s):
                return list(model.forward(items))
        except DeviceOutOfMemory as exc:
            if len(items) == 1:
                return [exc]
            self.safe_size[model.name] = max(1, len(items) // 2)
            log.warning(
                "batch_halved", model=model.name, batch_size=len(items), safe=self.safe_size[model.name]
            )
        except SoftTimeLimitExceeded as exc:
            return [exc] if len(items) == 1 else [RunAlone()] * len(items)
        except InferenceError as exc:
            if len(items) == 1:
                return [exc]
        half = len(items) // 2
        return self._forward(model, batch, items[:half]) + self._forward(model, batch, items[half:])
