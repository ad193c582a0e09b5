# SPDX-License-Identifier: Apache-2.0
"""When a refused caller may try again: by how fast the queues drain. Pure, with an injected clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

#: Seconds between two samples, and seconds over which the rate is measured and refusals are counted.
EVERY_S = 2.0
WINDOW_S = 10.0
#: The longest Retry-After, also while nothing drains.
LONGEST_S = 60


class Drain:
    """How many tasks leave the queues a second, and how many were refused of late.

    The time until a caller may try again is what it takes to drain as many tasks as were refused within the
    window: those callers come back, too, and would otherwise all find the queue full again.
    """

    def __init__(self, least_s: int, clock: Callable[[], float]) -> None:
        """``least_s``: the shortest Retry-After, and the one while the rate is unknown."""
        self._least_s = least_s
        self._clock = clock
        #: When, and how many tasks had ever left.
        self._samples: deque[tuple[float, int]] = deque()
        self._refused: deque[float] = deque(maxlen=100_000)

    def sample(self, left: int) -> None:
        """Note how many tasks have ever been claimed from the queues. A counter that fell begins anew."""
        now = self._clock()
        if self._samples and left < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, left))
        while now - self._samples[0][0] > WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """Tasks a second; None while it is not known: fewer than two samples, or old ones."""
        if len(self._samples) < 2 or self._clock() - self._samples[-1][0] > WINDOW_S:
            return None
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first else None

    def refuse(self) -> int:
        """Note that a task is refused; return after how many seconds its caller may try again."""
        now = self._clock()
        self._refused.append(now)
        while now - self._refused[0] > WINDOW_S:
            self._refused.popleft()
        rate = self.rate
        if rate is None:
            return self._least_s
        seconds = len(self._refused) / rate if rate > 0 else math.inf
        return max(self._least_s, math.ceil(min(seconds, LONGEST_S)))
