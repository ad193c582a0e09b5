# SPDX-License-Identifier: Apache-2.0
"""What a worker process keeps from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from gpuinfer.log import get_logger
from gpuinfer.worker.ceiling import Ceiling
from gpuinfer.worker.heartbeat import Pulse

if TYPE_CHECKING:
    from gpuinfer.worker.batcher import Batcher

log = get_logger(__name__)

#: Seconds that a stopping worker waits for Redis to take its results.
DRAIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Process:
    """One worker process, from its start to its end."""

    batcher: Batcher
    pulse: Pulse
    lock: IO[str]
    #: Identifies the folder of ``lock`` among all hosts and containers.
    domain: str
    ceiling: Ceiling

    def drain(self, *, crashed: bool) -> None:
        """Drain the batcher and tell systemd. The second call does nothing."""
        if not self.batcher.closed:
            self.pulse.stopping()
            log.info("stopping", worker=self.batcher.store.worker)
            self.batcher.drain(DRAIN_TIMEOUT_S, crashed=crashed)
            self.pulse.gone()
