# SPDX-License-Identifier: Apache-2.0
"""Tasks that wait for a model or a queue that no worker serves, and the command that helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpuinfer.log import get_logger
from gpuinfer.queue.depth import Lane

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stranded:
    """Tasks that no worker will take as things are."""

    waiting: int
    #: The command that starts a worker for them.
    remedy: str


class Reporter:
    """Logs once when tasks begin to wait for a worker that does not exist, and once when one does."""

    def __init__(self) -> None:
        self._said: frozenset[Lane] = frozenset()

    def report(self, stranded: Mapping[Lane, Stranded] | None) -> None:
        """Log what is new. None: nothing is known at this probe."""
        if stranded is None:
            return
        for lane in sorted(stranded.keys() - self._said):
            found = stranded[lane]
            log.warning(
                "nothing_serves",
                queue=lane.tier,
                model=lane.model,
                waiting=found.waiting,
                reason="no worker that runs or could be started serves this model in this queue",
                hint=found.remedy,
            )
        for lane in sorted(self._said - stranded.keys()):
            log.info("served_again", queue=lane.tier, model=lane.model)
        self._said = frozenset(stranded)
