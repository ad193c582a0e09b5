# SPDX-License-Identifier: Apache-2.0
"""One timer for all requests that may run long, instead of one per request."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

#: Minimum seconds between two checks.
_STEP_S = 0.01


class Lasting(Protocol):
    """Something with a time limit."""

    ended: bool

    def lasts(self) -> None:
        """Called if it has not ended in time."""


class Lastings:
    """Calls ``lasts`` of each item not removed within ``seconds``, up to ``_STEP_S`` late."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        #: In the order of their deadlines.
        self._known: deque[tuple[float, Lasting]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._known)

    def add(self, one: Lasting) -> None:
        """Start the time limit of an item."""
        loop = asyncio.get_running_loop()
        self._known.append((loop.time() + self._seconds, one))
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        known, now = self._known, loop.time()
        while known and (known[0][1].ended or known[0][0] <= now):
            _, one = known.popleft()
            if not one.ended:
                one.lasts()
        self._timer = loop.call_at(max(known[0][0], now + _STEP_S), self._look, loop) if known else None
