# SPDX-License-Identifier: Apache-2.0
"""When to claim behind a long batch: late enough for other workers, and early enough to be prepared.

Only for models with something to prepare. What is claimed is held for AHEAD_MOST_S at most before the device
should take it; where the batch that runs takes longer than usual, it is handed back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from gpuinfer.worker.engine import Engine

#: Seconds before the expected end of a batch at which the next is claimed at the earliest: what a worker
#: holds another one that is idle cannot run.
AHEAD_MOST_S = 0.05
#: Seconds that a claim takes with its record, and by how much threads fall short of preparing side by side.
CLAIM_S, SHARE = 0.005, 1.3


class Pace:
    """Watches the batch that runs. ``usual_s`` has the seconds that a model's batches take."""

    def __init__(self, engine: Engine, usual_s: Mapping[str, float]) -> None:
        self._engine = engine
        self._usual_s = usual_s
        self._alarm: threading.Timer | None = None

    def due(self) -> bool:
        """Tell whether the next batch should be claimed now, to be prepared when the device is free."""
        left = self._left()
        return left is not None and -AHEAD_MOST_S <= left <= self._needed()

    def late(self) -> bool:
        """Tell whether the batch that runs takes so long that nothing should be held behind it."""
        left = self._left()
        return left is not None and left < -AHEAD_MOST_S

    def watch(self) -> None:
        """Have the worker woken when the next batch is due."""
        self.close()
        left = self._left()
        wait = None if left is None else left - self._needed()
        if wait is not None and wait > 0:
            self._alarm = threading.Timer(wait, self._engine.wake)
            self._alarm.daemon = True
            self._alarm.start()

    def close(self) -> None:
        """Wake nobody any more."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _left(self) -> float | None:
        """Return the seconds until the batch that runs should end; None where that is not known."""
        batch = self._engine.current
        if batch is None or not self._engine.prepares(batch.model):
            return None
        usual = self._usual_s.get(batch.model)
        return None if usual is None else usual - self._engine.running_s

    def _needed(self) -> float:
        """Return the seconds from a claim until a full batch is prepared."""
        batch = self._engine.current
        if batch is None:
            return 0.0
        pipeline = self._engine.pipeline
        each = pipeline.prepare_s.get(batch.model, 0.0) * SHARE / pipeline.threads
        return min(AHEAD_MOST_S, CLAIM_S + each * self._engine.limit(batch.model))
