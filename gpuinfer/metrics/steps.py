# SPDX-License-Identifier: Apache-2.0
"""Running totals as rates of whole steps whose sum is what was counted. Pure.

Totals are read now and then, never quite at the end of a step. What was counted between two looks is taken
to have come evenly, and is divided among the steps it lies in. What is lost when a rate is stored in two
bytes is added to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuinfer.queue.series import FINE, pack, unpack

#: What was counted between two looks that are further apart than this is in no step.
MOST_GAP_S = 60.0


@dataclass
class Steps:
    """What is known from the last look, in plain values: another process can go on from there."""

    #: When the last look was, in Unix seconds, and the totals at that time.
    at: float = 0.0
    totals: dict[str, int] = field(default_factory=dict)
    #: What was counted in the step that is not over.
    open: dict[str, float] = field(default_factory=dict)
    #: By how much what was stored so far is less than what was counted, per second of a step.
    owed: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, found: object) -> Steps:
        """Return what ``vars`` of another one were; an empty one for anything else."""
        try:
            steps = cls(**found) if isinstance(found, dict) else cls()
        except TypeError:
            return cls()
        kept = (steps.totals, steps.open, steps.owed)
        sound = _is_number(steps.at) and all(isinstance(one, dict) for one in kept)
        return steps if sound and all(_is_number(n) for one in kept for n in one.values()) else cls()

    def add(self, at: float, totals: Mapping[str, int]) -> dict[int, dict[str, float]]:
        """Take the totals at a time; return the rates of each step that is over, by when it began.

        A total that is less than before has begun anew: Redis came back empty.
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
        """Return the rate to be stored. An idle step is 0, whatever is owed."""
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
    """Return it as JSON has it, for ``Steps.of``."""
    return vars(steps)
