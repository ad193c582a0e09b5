# SPDX-License-Identifier: Apache-2.0
"""A batcher that a test drives by hand: its channel, and the turns of its event loop."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpuinfer.worker.batcher import Batcher

#: What has just begun or moved does so as late as this: it stays just now while the machine stands still.
AHEAD_S = 600.0


class Line:
    """The channel's part: hands over what is claimed."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def claim(self, *, search: bool = True) -> int:
        state = self._batcher.state
        tasks = self._batcher.store.claim(
            self._batcher.wants(), state=state, begin=state == "idle", search=search
        )
        if tasks:
            self._batcher.receive(self, tasks)  # type: ignore[arg-type]  # all of a channel that is used
        return len(tasks)

    again = claim
    silent = True

    def withdraw(self) -> None:
        """No claim is on its way."""


def turn(batcher: Batcher, until: Callable[[], object], timeout: float = 60.0) -> None:
    """Do what the event loop does, until the condition holds."""
    end = time.monotonic() + timeout
    while not until():
        assert time.monotonic() < end
        assert batcher.channel is not None
        batcher.channel.claim()
        batcher.tick()
        time.sleep(0.005)
