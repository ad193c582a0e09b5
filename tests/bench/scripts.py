# SPDX-License-Identifier: Apache-2.0
"""What a claim costs Redis, by Redis's own count of the time its scripts take.

One connection claims one task after another. What is compared takes turns, so that a noisy moment of the
machine meets all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuinfer.client import calls, submissions
from gpuinfer.queue.claims import State
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, QueueSettings
from tests.bench.lines import Line, Sizes, Target, compare
from tests.services import RedisServer

_SETTINGS = QueueSettings()
_NAMES = tuple(f"m{number}" for number in range(20))


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Who claims, and what waits."""

    #: How many models the worker serves, and for how many of them tasks wait.
    models: int = 1
    busy: int = 1
    #: Callers with tasks, for each model; the empty one has no sub-list.
    callers: tuple[str, ...] = ("",)


def claim_cost(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Claim one task, as a worker of one model and of twenty, for callers and without."""
    del folder
    one = Case()
    cases = {
        "one": one,
        "idle": Case(models=20),
        "busy": Case(models=20, busy=20),
        "caller": Case(callers=("alice",)),
        "callers": Case(callers=tuple(f"caller{number}" for number in range(10))),
        "nothing": Case(busy=0),
        "nothing, 20": Case(models=20, busy=0),
    }
    costs: dict[str, list[float]] = {name: [] for name in cases}
    redis = RedisServer()
    try:
        for _ in range(sizes.claim_rounds):
            for name, case in cases.items():
                costs[name].append(_cost(redis, case, sizes.claims))
    finally:
        redis.close()
    bound, none = Target(op="<=", value=1.3), Target(op="<=", value=1.03)
    rows = (
        ("a claim, 20 models, 19 idle", "idle", "one", "one model", bound),
        ("a claim, 20 models, all busy", "busy", "one", "one model", bound),
        ("a claim, one caller", "caller", "one", "no caller", none),
        ("a claim, ten callers", "callers", "one", "no caller", None),
        ("a claim that finds nothing, 20 models", "nothing, 20", "nothing", "one model", None),
    )
    for what, name, other, beside, target in rows:
        yield compare(what, "us", costs[name], costs[other], beside, target)


def _cost(redis: RedisServer, case: Case, claims: int) -> float:
    """Return the microseconds a claim of one task takes Redis."""
    with redis.client() as raw:
        raw.flushdb()
        names = _NAMES[: case.models]
        store = Store(raw, "gpu0@bench", QUEUES, _SETTINGS, models=names)
        store.register(default=names[0])
        _fill(raw, names[: case.busy], case.callers, claims + 100)
        state: State = "free" if case.busy else "idle"
        for _ in range(20):  # loads the script, begins the epoch
            store.claim(1, state=state)
        raw.config_resetstat()
        for _ in range(claims):
            store.claim(1, state=state)
        found: Any = raw.info("commandstats")["cmdstat_evalsha"]
        if found["calls"] != claims:
            raise RuntimeError(f"{found['calls']} scripts were counted, not {claims}")
        return float(found["usec"]) / claims


def _fill(raw: Any, models: Sequence[str], callers: Sequence[str], count: int) -> None:
    """Submit so many tasks at least, the same number for each model and caller."""
    each = count // max(1, len(models) * len(callers)) + 1
    for model in models:
        for caller in callers:
            tasks = [submissions.build([0.0] * 8, many=False, model=model) for _ in range(each)]
            tasks = [replace(task, caller=caller) for task in tasks]
            for call in calls.bulk(tasks, _SETTINGS):
                bind(raw, "submit")(args=call.args)
