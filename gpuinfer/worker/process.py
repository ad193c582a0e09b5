# SPDX-License-Identifier: Apache-2.0
"""What a worker process holds for its life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from gpuinfer.log import get_logger
from gpuinfer.worker.ceiling import Ceiling
from gpuinfer.worker.heartbeat import Pulse

if TYPE_CHECKING:
    from gpuinfer.worker.batcher import Batcher

log = get_logger(__name__)

#: Seconds that results may wait for Redis when the worker stops.
DRAIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Process:
    """One worker process, from its start to its end."""

    batcher: Batcher
    pulse: Pulse
    lock: IO[str]
    #: Which processes could not run beside this one: they take their locks in the same folder.
    domain: str
    ceiling: Ceiling

    def drain(self, *, crashed: bool) -> None:
        """Drain the batcher and tell systemd. The second call does nothing."""
        if not self.batcher.closed:
            self.pulse.stopping()
            log.info("stopping", worker=self.batcher.store.worker)
            self.batcher.drain(DRAIN_TIMEOUT_S, crashed=crashed)
            self.pulse.gone()
