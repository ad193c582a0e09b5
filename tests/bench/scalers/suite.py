# SPDX-License-Identifier: Apache-2.0
"""The fixed set of traces: what this product is for, and what it is not best at."""

from __future__ import annotations

from typing import TypedDict

from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.simulator.cluster import Model
from gpuinfer.watcher.simulator.run import Scenario, step_s
from gpuinfer.watcher.simulator.traces import Pattern, make

#: Small images, batches of 32: 25 tasks a second one by one, 200 in full batches.
QUICK = Model(single_s=0.04, max_batch=32, gain=8.0)
#: Half a second a task, batches of 4 gain little: 2 a second one by one, 3 in full batches.
SLOW = Model(single_s=0.5, max_batch=4, gain=1.5)
#: The suite is run with each of these, and the medians count: where bursts fall is chance.
SEEDS = (1, 2, 3)


def scenario(
    pattern: Pattern,
    *,
    name: str = "",
    gpus: int = 8,
    floor: int = 0,
    load: float | None = None,
    seconds: float = 3600.0,
    model: Model = QUICK,
    seed: int = 1,
    settings: WatcherSettings | None = None,
) -> Scenario:
    """Make a scenario from a pattern. ``load``: the share of the fleet that it asks for."""
    capacity, step = gpus * model.rate, step_s(model)
    return Scenario(
        name=name or pattern,
        trace=make(pattern, capacity=capacity, seconds=seconds, step_s=step, seed=seed, load=load),
        gpus=gpus,
        floor=floor,
        model=model,
        seed=seed,
        settings=settings or WatcherSettings(),
    )


class _Given(TypedDict):
    settings: WatcherSettings | None
    seed: int


def suite(settings: WatcherSettings | None = None, seed: int = SEEDS[0]) -> list[Scenario]:
    """Return the fixed set. Made again each time, from fixed seeds: the same traces on every machine."""
    given: _Given = {"settings": settings, "seed": seed}
    return [
        scenario("burst", name="burst from zero", floor=0, **given),
        scenario("burst", name="burst from one", floor=1, **given),
        scenario("burst", name="burst, slow model", floor=0, model=SLOW, **given),
        scenario("burst", name="burst, 64 GPUs", floor=1, gpus=64, **given),
        scenario("flash", name="flash crowd", floor=1, **given),
        scenario("flash", name="flash, 64 GPUs", floor=1, gpus=64, **given),
        scenario("poisson", name="steady", floor=1, **given),
        scenario("poisson", name="steady, slow model", floor=0, model=SLOW, **given),
        scenario("poisson", name="one task in 100 s", floor=0, load=0.0004, model=SLOW, **given),
        scenario("diurnal", name="day and night", floor=1, seconds=7200, **given),
        scenario("diurnal", name="day, slow model", floor=0, seconds=7200, model=SLOW, **given),
    ]
