# SPDX-License-Identifier: Apache-2.0
"""A batch of arrays on its way to the device, as a whole, while the batch before it runs.

Arrays and lists are decoded and stacked together, which is far faster than one by one; on a GPU their copy
begins as well. A thread before the device does it, or the device's own where that is free sooner.
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

#: Seconds of work below which handing it to another thread costs about as much as it saves.
WORTH_A_THREAD_S = 0.0002


def values_of(batch: Batch) -> list[Any]:
    """Return the inputs of a batch."""
    return [value for part in batch.parts for value in part.task.inputs[part.start : part.stop]]


def each(call: Callable[[Sequence[Any]], Sequence[Any]], values: Sequence[Any]) -> list[Any]:
    """Call for all values at once; if that fails, for each by itself, so that only the culprit fails."""
    try:
        return list(call(values)) if values else []
    except Exception as exc:
        if len(values) == 1:
            return [exc if isinstance(exc, GpuinferError) else InferenceError(described(exc))]
        return [outcome for value in values for outcome in each(call, [value])]


class Usual:
    """What a step usually takes for one item of a model: a moving average. For any thread."""

    def __init__(self) -> None:
        self._item_s: dict[str, float] = {}

    def note(self, model: str, size: int, seconds: float) -> None:
        """A step of ``size`` items has taken so long."""
        took = seconds / max(1, size)
        usual = self._item_s.get(model, took)
        self._item_s[model] = usual + (took - usual) / 4

    def seconds(self, model: str, size: int) -> float:
        """Return the seconds that a step of ``size`` items should take; 0 where none is known."""
        return size * self._item_s.get(model, 0.0)


class Stager:
    """Decodes batches and brings them towards their model's device."""

    def __init__(self) -> None:
        self.usual = Usual()

    def bring(self, model: LoadedModel, batch: Batch) -> Sequence[Any]:
        """Return an item or an error for each input; items are staged where all are good."""
        began = time.monotonic()
        values = values_of(batch)
        items: Sequence[Any] = each(model.prepare, values)
        if not any(isinstance(item, Exception) for item in items):
            items = model.stage(items)
        self.usual.note(model.name, len(values), time.monotonic() - began)
        return items


class Staging:
    """One batch that is staged ahead, once: by the thread that is first."""

    def __init__(self, bring: Callable[[], Sequence[Any]]) -> None:
        self._bring: Callable[[], Sequence[Any]] | None = bring
        self._gate = threading.Lock()
        self._over = threading.Event()
        self._items: Sequence[Any] | None = None
        self._failure: BaseException | None = None
        self._begun = self._left = False

    def work(self) -> None:
        """Stage the batch, in a thread before the device; nothing where the device was first."""
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
        """Wait for the items, in the device's thread. None where nobody has begun: nobody will.

        Raises what decoding or staging has raised.
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
        """The batch was withdrawn: stage it no more, and let go of what is staged."""
        self._left = True
        if self._gate.acquire(blocking=False) or self._over.is_set():
            self._bring = self._items = None

    @property
    def busy(self) -> bool:
        """True while a thread stages it: that may end the process."""
        return self._begun and not self._over.is_set()
