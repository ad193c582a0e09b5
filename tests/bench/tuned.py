# SPDX-License-Identifier: Apache-2.0
"""The second baseline: stock Celery with the settings that suit it best here, found by a small search."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tests.bench.baseline import Tuning
from tests.bench.lines import Line, Sizes, compare
from tests.bench.measures import PAUSES_S, backlog, trips
from tests.bench.models import vectors
from tests.bench.stacks import Ours, Stock, World

#: What is tried. A prefork child would have to load the model itself; with one child it is a solo worker
#: behind a pipe.
SEARCHED = tuple(
    Tuning(pool=pool, prefetch=prefetch, late=late)
    for pool, prefetch, late in product(("solo", "threads"), (1, 16, 128), (True, False))
)


def best(folder: Path, sizes: Sizes) -> tuple[Tuning, float]:
    """Return the settings that work off a backlog the fastest, and the rate in tasks a second."""
    values = vectors(sizes.search)
    rates = {tuning: backlog(Stock(folder, tuning=tuning), values) for tuning in SEARCHED}
    tuning = max(rates, key=rates.__getitem__)
    return tuning, rates[tuning]


def tuned(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Find the best settings, then compare as with the usual ones: a backlog, and idle round trips."""
    tuning, rate = best(folder, sizes)
    beside = "tuned Celery"
    yield Line(what=f"  tuned Celery: {tuning}", unit="tasks/s", ours=rate)
    rates: tuple[list[float], list[float]] = ([], [])
    taken: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for _ in range(sizes.repeats):
        rates[1].append(backlog(Stock(folder, tuning=tuning), vectors(sizes.stock_backlog)))
        rates[0].append(backlog(Ours(folder), vectors(sizes.backlog)))
        taken[1].append(_trips(Stock(folder, tuning=tuning), sizes.trips))
        taken[0].append(_trips(Ours(folder), sizes.trips))
    yield compare(f"backlog of {sizes.backlog:,}", "tasks/s", *rates, beside, None)
    for place, name in enumerate(("p50", "p99")):
        ours, other = ([pair[place] for pair in found] for found in taken)
        yield compare(f"idle round trip, {name}", "ms", ours, other, beside, None)


def _trips(world: World, count: int) -> tuple[float, float]:
    with world:
        world.start()
        gc.collect()
        gc.freeze()
        return trips(world, count, PAUSES_S)
