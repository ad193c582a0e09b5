# SPDX-License-Identifier: Apache-2.0
"""Computes Retry-After from the rate at which the queues drain. Pure, with an injected clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

#: Seconds between samples, and the window in seconds of the rate and of counted refusals.
EVERY_S = 2.0
WINDOW_S = 10.0
#: Maximum Retry-After in seconds, also while nothing drains.
LONGEST_S = 60


class Drain:
    """The drain rate of the queues, and the number of recent refusals.

    Retry-After is the time to drain as many tasks as were refused within the window: their callers retry,
    too, and would otherwise all find the queue full again.
    """

    def __init__(self, least_s: int, clock: Callable[[], float]) -> None:
        """``least_s``: the minimum Retry-After in seconds, also used while the rate is unknown."""
        self._least_s = least_s
        self._clock = clock
        #: (time, total claimed tasks).
        self._samples: deque[tuple[float, int]] = deque()
        self._refused: deque[float] = deque(maxlen=100_000)

    def sample(self, left: int) -> None:
        """Add a sample of the total of claimed tasks. If it fell, start over."""
        now = self._clock()
        if self._samples and left < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, left))
        while now - self._samples[0][0] > WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """Tasks per second; None with fewer than two recent samples."""
        if len(self._samples) < 2 or self._clock() - self._samples[-1][0] > WINDOW_S:
            return None
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first else None

    def refuse(self) -> int:
        """Count a refused task; return its Retry-After in seconds."""
        now = self._clock()
        self._refused.append(now)
        while now - self._refused[0] > WINDOW_S:
            self._refused.popleft()
        rate = self.rate
        if rate is None:
            return self._least_s
        seconds = len(self._refused) / rate if rate > 0 else math.inf
        return max(self._least_s, math.ceil(min(seconds, LONGEST_S)))
