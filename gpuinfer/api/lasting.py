# SPDX-License-Identifier: Apache-2.0
"""What is to be done about requests that last: one timer for all of them, and none for those that do not."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

#: Seconds between two looks, at least.
_STEP_S = 0.01


class Lasting(Protocol):
    """Something that may last."""

    ended: bool

    def lasts(self) -> None:
        """It has not ended in time."""


class Lastings:
    """Tells each that is still there ``seconds`` after it was added, or up to ``_STEP_S`` later."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        #: In the order in which they are due.
        self._known: deque[tuple[float, Lasting]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._known)

    def add(self, one: Lasting) -> None:
        """Tell it in time, unless it has ended then."""
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
