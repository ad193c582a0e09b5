# SPDX-License-Identifier: Apache-2.0
"""Load figures for a worker's heartbeat: device use, memory, and the time to load models."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpuinfer.worker.ceiling import resident_bytes

if TYPE_CHECKING:
    from gpuinfer.worker.batcher import Batcher


class Vitals:
    """The figures of one worker process. For its main thread."""

    def __init__(self, batcher: Batcher, load_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._batcher = batcher
        self._load_s = load_s
        self._clock = clock
        self._read_at, self._busy_s = clock(), 0.0

    def read(self) -> dict[str, Any]:
        """Return ``busy`` (0 to 1, since the last call), ``memory_bytes``, ``load_s`` and, with a GPU,
        ``device_memory_bytes``: GPU memory held by torch."""
        now, busy_s = self._clock(), self._total()
        share = (busy_s - self._busy_s) / max(now - self._read_at, 0.001)
        self._read_at, self._busy_s = now, busy_s
        found = {
            "busy": round(min(1.0, max(0.0, share)), 4),
            "memory_bytes": resident_bytes(),
            "load_s": round(self._load_s, 3),
        }
        if self._batcher.device != "cpu":
            import torch

            found["device_memory_bytes"] = torch.cuda.memory_reserved()
        return found

    def _total(self) -> float:
        """Return the device seconds of this process, including the running batch."""
        engine = self._batcher.engine
        running_s = engine.running_s if engine.current is not None else 0.0
        return self._batcher.accounts.busy_s + running_s
