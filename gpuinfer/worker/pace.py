# SPDX-License-Identifier: Apache-2.0
"""Decides when to claim behind a long batch: late, for other workers, but early enough to prepare.

Claimed tasks should wait at most AHEAD_MOST_S for the device. If the running batch takes longer than usual,
the batch behind it is returned to the queue.
"""

from __future__ import annotations

import threading

from gpuinfer.worker.engine import Engine

#: During a batch that takes longer than this, nothing is claimed, as another worker may become idle earlier.
LONG_BATCH_S = 0.02
#: Maximum seconds before the expected end of a batch to claim the next one: an idle worker cannot run tasks
#: that another holds.
AHEAD_MOST_S = 0.05
#: Seconds for a claim with its record, and the factor for threads that do not prepare fully in parallel.
CLAIM_S, SHARE = 0.005, 1.3


class Pace:
    """Watches the batch that runs."""

    def __init__(self, engine: Engine, usual_s: dict[str, float] | None = None) -> None:
        self._engine = engine
        #: Model -> seconds that its batches run on the device, a moving average.
        self.usual_s = {} if usual_s is None else usual_s
        self._alarm: threading.Timer | None = None

    def ran(self, model: str, seconds: float) -> None:
        """Take note of how long a batch ran."""
        usual = self.usual_s.get(model, seconds)
        self.usual_s[model] = usual + (seconds - usual) / 4

    def long(self) -> bool:
        """Whether the running batch takes so long that no batch should be held behind it."""
        if self._engine.current is None:
            return False
        usual = self._usual()
        return usual is None or usual > LONG_BATCH_S or self._engine.running_s > LONG_BATCH_S

    def due(self) -> bool:
        """Whether the next batch should be claimed now, to be prepared when the device is free."""
        left = self._left()
        return left is not None and -AHEAD_MOST_S <= left <= self._needed()

    def late(self) -> bool:
        """Tell whether the batch that runs takes longer than usual: what is held behind it should go back."""
        left = self._left()
        return left is not None and left < -AHEAD_MOST_S

    def watch(self) -> None:
        """Wake the worker when the next batch is due. Call it again if that was too early.

        That happens if the device had to wait for the inputs of the running batch.
        """
        self.close()
        usual = self._usual()
        if usual is None or usual <= LONG_BATCH_S:  # claims go on while a short one runs
            return
        wait = usual - self._engine.running_s - self._needed()
        if wait > 0:
            self._alarm = threading.Timer(wait, self._engine.wake)
            self._alarm.daemon = True
            self._alarm.start()

    def close(self) -> None:
        """Cancel the wake-up."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _left(self) -> float | None:
        """Return the estimated seconds until the running batch ends; None if unknown."""
        usual = self._usual()
        return None if usual is None else usual - self._engine.running_s

    def _usual(self) -> float | None:
        """Return the estimated seconds of the running batch; None if unknown."""
        batch = self._engine.current
        return None if batch is None else self.usual_s.get(batch.model)

    def _needed(self) -> float:
        """Return the seconds from a claim until a full batch is prepared."""
        batch = self._engine.current
        if batch is None:
            return 0.0
        pipeline, size = self._engine.pipeline, self._engine.limit(batch.model)
        if self._engine.prepares(batch.model):
            ready_s = size * pipeline.prepare_s.get(batch.model, 0.0) * SHARE / pipeline.threads
        else:
            ready_s = pipeline.stager.usual.seconds(batch.model, size)
        return min(AHEAD_MOST_S, CLAIM_S + ready_s)
