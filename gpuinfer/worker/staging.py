# SPDX-License-Identifier: Apache-2.0
"""Prepares a whole batch of arrays for the device while the previous batch runs.

Arrays and lists are decoded and stacked together, which is much faster than one by one; for a GPU the copy is
started, too. A preparing thread does it, or the device thread if that is free earlier.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpuinfer.errors import GpuinferError, InferenceError
from gpuinfer.models.blame import described
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.worker.buffer import Batch

#: Below this many seconds of work, another thread costs about as much as it saves.
WORTH_A_THREAD_S = 0.0002


def values_of(batch: Batch) -> list[Any]:
    """Return the inputs of a batch."""
    return [value for part in batch.parts for value in part.task.inputs[part.start : part.stop]]


def each(call: Callable[[Sequence[Any]], Sequence[Any]], values: Sequence[Any]) -> list[Any]:
    """Call with all values at once; if that fails, with each one, so that only the faulty one fails."""
    try:
        return list(call(values)) if values else []
    except Exception as exc:
        if len(values) == 1:
            return [exc if isinstance(exc, GpuinferError) else InferenceError(described(exc))]
        return [outcome for value in values for outcome in each(call, [value])]


class Usual:
    """Moving average of the seconds of a step per item, by model. Thread-safe."""

    def __init__(self) -> None:
        self._item_s: dict[str, float] = {}

    def note(self, model: str, size: int, seconds: float) -> None:
        """Record that a step of ``size`` items took ``seconds``."""
        took = seconds / max(1, size)
        usual = self._item_s.get(model, took)
        self._item_s[model] = usual + (took - usual) / 4

    def seconds(self, model: str, size: int) -> float:
        """Return the estimated seconds for a step of ``size`` items; 0 if unknown."""
        return size * self._item_s.get(model, 0.0)


class Stager:
    """Decodes batches and starts their copy to the device."""

    def __init__(self) -> None:
        self.usual = Usual()

    def bring(self, model: LoadedModel, batch: Batch) -> Sequence[Any]:
        """Return an item or an error for each input; if all are valid, the items are staged."""
        began = time.monotonic()
        values = values_of(batch)
        items: Sequence[Any] = each(model.prepare, values)
        if not any(isinstance(item, Exception) for item in items):
            items = model.stage(items)
        self.usual.note(model.name, len(values), time.monotonic() - began)
        return items


class Staging:
    """One batch to stage ahead, by whichever thread is first."""

    def __init__(self, bring: Callable[[], Sequence[Any]]) -> None:
        self._bring: Callable[[], Sequence[Any]] | None = bring
        self._gate = threading.Lock()
        self._over = threading.Event()
        self._items: Sequence[Any] | None = None
        self._failure: BaseException | None = None
        self._begun = self._left = False

    def work(self) -> None:
        """Stage the batch in a preparing thread, unless the device thread was first."""
        bring = self._bring
        if bring is None or not self._gate.acquire(blocking=False):
            return
        self._begun = True
        try:
            items = bring()
            self._items = None if self._left else items
        except BaseException as exc:
            self._failure = exc
        self._bring = None
        self._over.set()

    def take(self) -> Sequence[Any] | None:
        """Wait for the items, in the device thread. None: no thread has started, and none will.

        Raises the error of decoding or staging.
        """
        if self._gate.acquire(blocking=False):
            self._bring = None
            return None
        self._over.wait()
        items, self._items = self._items, None
        if self._failure is not None:
            raise self._failure
        return items

    def leave(self) -> None:
        """Cancel staging of a withdrawn batch, and free its items."""
        self._left = True
        if self._gate.acquire(blocking=False) or self._over.is_set():
            self._bring = self._items = None

    @property
    def busy(self) -> bool:
        """Whether a thread is staging it (a crash there is charged to the batch)."""
        return self._begun and not self._over.is_set()
