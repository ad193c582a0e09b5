# SPDX-License-Identifier: Apache-2.0
"""A line of the table, and how much of everything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The figure to reach: a ratio, or where nothing is compared the value itself."""

    op: Literal[">=", "<="]
    value: float

    def met(self, figure: float) -> bool:
        return figure >= self.value if self.op == ">=" else figure <= self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the table; figures are medians over the repeats."""

    what: str
    unit: str
    ours: float
    #: What ours is compared with, by name and figure.
    beside: str | None = None
    other: float | None = None
    target: Target | None = None
    #: All repeats of ours, and of the other.
    repeats: tuple[Sequence[float], Sequence[float]] = ((), ())

    @property
    def ratio(self) -> float | None:
        return self.ours / self.other if self.other else None

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.target.met(self.ours if self.ratio is None else self.ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything."""

    repeats: int = 3
    backlog: int = 20_000
    #: The baseline's backlog: its rate does not depend on the length, and it takes its time.
    stock_backlog: int = 5_000
    submits: int = 5_000
    trips: int = 1_000
    steady: int = 600
    #: Tasks of 5 ms for two workers: four seconds' worth.
    sleeps: int = 1_200
    queued: int = 5_000
    tasks_for_memory: int = 200_000
    warm_up: int = 20_000
    idle_s: float = 20.0
    #: What each setting of stock Celery works off while the best one is looked for.
    search: int = 2_000
    #: A backlog for two workers: it has to last.
    shared_backlog: int = 60_000
    arrivals: int = 600
    claims: int = 1_000
    #: How often each kind of claim is measured, in turns: a difference of 3 % has to show.
    claim_rounds: int = 15
    images: int = 1_280


QUICK = Sizes(
    repeats=1,
    backlog=5_000,
    stock_backlog=500,
    submits=1_000,
    trips=200,
    steady=200,
    sleeps=200,
    queued=1_000,
    tasks_for_memory=20_000,
    warm_up=5_000,
    idle_s=5.0,
    search=200,
    shared_backlog=5_000,
    arrivals=60,
    claims=300,
    claim_rounds=3,
    images=256,
)


def compare(
    what: str, unit: str, ours: Sequence[float], other: Sequence[float], beside: str, target: Target | None
) -> Line:
    """Return the line for two series of repeats."""
    return Line(
        what=what,
        unit=unit,
        ours=median(ours),
        other=median(other),
        beside=beside,
        target=target,
        repeats=(tuple(ours), tuple(other)),
    )
