# SPDX-License-Identifier: Apache-2.0
"""Copies between GPU and host that overlap with computation.

::

    copy-in stream    ─ copy B in ──┐ event
    compute stream    ─ compute A ──┴─ wait ─ compute B ─┐ event
    copy-out stream                 ─ copy A out ─┐ event└─ copy B out
                                                  └─ land: the host may read A

Only page-locked memory is copied asynchronously. torch reuses page-locked blocks of about the same size once
their copies have finished (``CachingHostAllocator``); this module limits the amount in use.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gpuinfer.models.tensors import Array

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Maximum bytes of page-locked memory in use, as it cannot be swapped out. Beyond it, normal memory is used.
PINNED_BYTES = 256 * 1024 * 1024


class Surface(Protocol):
    """The operations of CUDA that are used. A stream runs its work in order, in parallel to the others."""

    def stream(self) -> Any:
        """Make a stream."""

    def current(self) -> Any:
        """Return the stream on which this thread computes."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream the current one of this thread."""

    def record(self, stream: Any) -> Any:
        """Return an event that happens once the stream has run all work queued so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """Make a stream wait for an event before its next work. The host does not wait."""

    def finish(self, event: Any) -> None:
        """Make the host wait for an event. Raises RuntimeError if work has failed on the GPU."""

    def page_locked(self, count: int) -> torch.Tensor:
        """Return this many bytes of page-locked memory on the host."""

    def empty_like(self, source: torch.Tensor) -> torch.Tensor:
        """Return memory on the GPU, for this thread's current stream."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy on this thread's current stream."""

    def away(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is on the GPU."""

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Do not reuse a tensor's memory until the stream has run all work queued so far."""


class Cuda:
    """torch's CUDA, as a ``Surface``."""

    def __init__(self, device: str) -> None:
        self._device = device

    def stream(self) -> Any:
        import torch

        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch does not annotate it

    def current(self) -> Any:
        import torch

        return torch.cuda.current_stream(self._device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(stream)

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def finish(self, event: Any) -> None:
        event.synchronize()

    def page_locked(self, count: int) -> torch.Tensor:
        import torch

        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def empty_like(self, source: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.empty_like(source, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def away(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        tensor.record_stream(stream)


@dataclass(frozen=True, slots=True)
class Host:
    """Memory of the host to copy from or to, as a tensor and as an array. The array keeps it allocated."""

    tensor: torch.Tensor
    array: Array


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tensors that are being copied to the GPU, and their sources."""

    tensors: Sequence[torch.Tensor]
    sources: Sequence[Host]
    event: Any


class Copies:
    """One model's copies in and out. Any thread may call ``host``, ``send`` and ``land``; the other methods
    are for the device thread."""

    def __init__(self, surface: Surface, most_bytes: int = PINNED_BYTES) -> None:
        self._surface = surface
        self._most = most_bytes
        self._in, self._out = surface.stream(), surface.stream()
        self._lock = threading.Lock()
        #: The page-locked arrays in use, and their bytes.
        self._locked: list[tuple[weakref.ref[Array], int]] = []

    def host(self, shape: Sequence[int], dtype: torch.dtype, of: np.dtype[Any] | None = None) -> Host:
        """Return memory to copy from or to, page-locked unless too much is in use.

        ``of``: the array's dtype, if numpy does not have the tensor's.
        """
        size = dtype.itemsize * math.prod(shape)
        memory, whole = self._memory(size)
        array = whole.view(_numpy_dtype(dtype) if of is None else of).reshape(shape)
        return Host(memory.view(dtype).view(tuple(shape)), array)

    def _memory(self, size: int) -> tuple[torch.Tensor, Array]:
        """Return bytes as a tensor and as an array, to which each view of it keeps a reference."""
        import torch

        with self._lock:
            self._locked = [(ref, count) for ref, count in self._locked if ref() is not None]
            if 0 < size <= self._most - sum(count for _, count in self._locked):
                try:
                    memory = self._surface.page_locked(size)
                except RuntimeError:  # the system allows no more: use normal memory from now on
                    self._most = 0
                else:
                    whole: Array = memory.numpy()
                    self._locked.append((weakref.ref(whole), size))
                    return memory, whole
        memory = torch.empty(size, dtype=torch.uint8)
        return memory, memory.numpy()

    def send(self, sources: Sequence[Host]) -> Arrival:
        """Start to copy memory of the host to the GPU."""
        surface = self._surface
        with surface.on(self._in):
            targets = [surface.empty_like(source.tensor) for source in sources]
            for target, source in zip(targets, sources, strict=True):
                surface.copy(target, source.tensor)
            return Arrival(targets, sources, surface.record(self._in))

    def arrive(self, arrival: Arrival) -> Sequence[torch.Tensor]:
        """Return the tensors that were sent. This thread's stream waits for them; the host does not."""
        stream = self._surface.current()
        self._surface.wait(stream, arrival.event)
        for tensor in arrival.tensors:
            self._surface.keep(tensor, stream)
        return arrival.tensors

    def away(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is on the GPU, so that it must be fetched."""
        return self._surface.away(tensor)

    def computed(self) -> Any:
        """Wait until this thread's stream has finished; return the event. Raises the GPU's error."""
        event = self._surface.record(self._surface.current())
        self._surface.finish(event)
        return event

    def fetch(self, sources: Sequence[torch.Tensor], computed: Any) -> tuple[list[Array], Any]:
        """Start to copy results to the host. The arrays may be read after ``land(event)``."""
        surface = self._surface
        arrays = []
        with surface.on(self._out):
            surface.wait(self._out, computed)
            for source in sources:
                target = self.host(source.shape, source.dtype)
                surface.copy(target.tensor, source)
                surface.keep(source, self._out)
                arrays.append(target.array)
            return arrays, surface.record(self._out)

    def land(self, event: Any) -> None:
        """Wait until results are in the host's memory. Raises RuntimeError if the GPU has failed."""
        self._surface.finish(event)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    import torch

    return torch.empty(0, dtype=dtype).numpy().dtype
