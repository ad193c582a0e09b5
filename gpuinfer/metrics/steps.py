# SPDX-License-Identifier: Apache-2.0
"""Converts running totals to rates per step of the history, without losing counts. Pure.

Totals are read at irregular times, not exactly at the end of a step. The increase between two readings is
spread evenly over the steps between them. The rounding error of storing a rate in two bytes is carried over
to the next step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuinfer.queue.series import FINE, pack, unpack

#: If two readings are further apart than this many seconds, the increase between them is dropped.
MOST_GAP_S = 60.0


@dataclass
class Steps:
    """State of the last reading, in plain values, so that another process can continue."""

    #: Unix time of the last reading, and the totals then.
    at: float = 0.0
    totals: dict[str, int] = field(default_factory=dict)
    #: Counts in the current, unfinished step.
    open: dict[str, float] = field(default_factory=dict)
    #: Rounding error so far, as a rate: exact minus stored.
    owed: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, found: object) -> Steps:
        """Return the Steps saved by ``state``; empty Steps for any other value."""
        try:
            steps = cls(**found) if isinstance(found, dict) else cls()
        except TypeError:
            return cls()
        kept = (steps.totals, steps.open, steps.owed)
        sound = _is_number(steps.at) and all(isinstance(one, dict) for one in kept)
        return steps if sound and all(_is_number(n) for one in kept for n in one.values()) else cls()

    def add(self, at: float, totals: Mapping[str, int]) -> dict[int, dict[str, float]]:
        """Add a reading; return the rates of each finished step, by its start time.

        A total lower than before has restarted from 0: Redis lost its data.
        """
        over: dict[int, dict[str, float]] = {}
        if 0 < at - self.at <= MOST_GAP_S:
            grown = {name: _grown(count, self.totals.get(name, 0)) for name, count in totals.items()}
            last = int(at // FINE.step_s)
            for step in range(int(self.at // FINE.step_s), last + 1):
                begin, end = max(self.at, step * FINE.step_s), min(at, (step + 1) * FINE.step_s)
                share = (end - begin) / (at - self.at)
                for name, count in grown.items():
                    self.open[name] = self.open.get(name, 0.0) + count * share
                if step < last:
                    over[step * FINE.step_s] = {name: self._rate(name, n) for name, n in self.open.items()}
                    self.open = {}
        else:
            self.open, self.owed = {}, {}
        self.at, self.totals = at, dict(totals)
        return over

    def _rate(self, name: str, count: float) -> float:
        """Return the rate to store. An idle step is 0, regardless of the rounding error."""
        if count <= 0:
            return 0.0
        exact = count / FINE.step_s + self.owed.get(name, 0.0)
        stored = unpack(pack(exact))[0] or 0.0
        self.owed[name] = exact - stored
        return stored


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _grown(count: int, before: int) -> int:
    return count - before if count >= before else count


def state(steps: Steps) -> Mapping[str, Any]:
    """Return the state for JSON; ``Steps.of`` restores it."""
    return vars(steps)
