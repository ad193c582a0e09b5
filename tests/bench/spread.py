# SPDX-License-Identifier: Apache-2.0
"""Two workers: how much faster than one they are, and how long a task waits for them at 80 % load."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from heapq import heapreplace
from pathlib import Path
from random import Random
from statistics import fmean, quantiles

from tests.bench.lines import Line, Sizes, Target, compare
from tests.bench.machine import unpinned
from tests.bench.models import vectors
from tests.bench.stacks import Fleet

#: What the stubs sleep for an item: one for throughput, one for waits.
SHORT_S, LONG_S = 0.005, 0.1
#: The share of the time that both workers are busy.
LOAD = 0.8
WORKERS = 2
#: Callers who wait at the same time, at most; an arrival is never late for want of one.
CALLERS = 64


# -- throughput ---------------------------------------------------------------------------


def speed_up(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Work off one backlog with one worker and with two, on the same two cores."""
    rates: dict[int, list[float]] = {1: [], WORKERS: []}
    spent: dict[tuple[int, str], list[float]] = {}
    for _ in range(sizes.repeats):
        for count, series in rates.items():
            fleet = Fleet(folder, workers=count)
            rate, used = _drain(fleet, vectors(sizes.shared_backlog))
            series.append(rate)
            for who, seconds in used.items():
                spent.setdefault((count, who), []).append(seconds)
    what = f"backlog of {sizes.shared_backlog:,}, two workers"
    yield compare(what, "tasks/s", rates[WORKERS], rates[1], "one worker", Target(op=">=", value=1.3))
    for who in ("workers", "Redis"):
        two, one = spent[WORKERS, who], spent[1, who]
        yield compare(f"  CPU a task, {who}", "us", two, one, "one worker", None)
    sleepy: dict[int, list[float]] = {1: [], WORKERS: []}
    for _ in range(sizes.repeats):
        for count, series in sleepy.items():
            fleet = Fleet(folder, "steady1", workers=count, sleep_s=SHORT_S)
            series.append(_drain(fleet, [[0.0]] * sizes.sleeps)[0])
    what = "sleeps 5 ms an item, two workers"
    yield compare(what, "tasks/s", sleepy[WORKERS], sleepy[1], "one worker", Target(op=">=", value=1.9))


def _drain(fleet: Fleet, values: Sequence[object]) -> tuple[float, dict[str, float]]:
    """Start the workers, open the gate; return tasks a second and microseconds of processor a task."""
    with fleet:
        with fleet.behind_a_gate(values) as ids:
            fleet.start()
            before = fleet.cpu_seconds()
        began, ended = fleet.drain(ids, poll_s=0.02)
        after = fleet.cpu_seconds()
        used = {who: 1e6 * (after[who] - before[who]) / len(ids) for who in before}
        return len(ids) / (ended - began), used


# -- waits --------------------------------------------------------------------------------


def waits(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Let tasks of 100 ms arrive at random for two workers; beside it one ideal queue with two servers."""
    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for repeat in range(sizes.repeats):
        arrivals, waited = _serve(folder, sizes.arrivals, Random(repeat))  # noqa: S311  no secret
        found[0].append(_typical(waited))
        found[1].append(_typical(ideal_waits(arrivals, LONG_S, WORKERS)))
    for place, (name, target) in enumerate((("mean", None), ("p99", Target(op="<=", value=1.3)))):
        ours, ideal = ([pair[place] for pair in series] for series in found)
        yield compare(f"wait for two workers at 80 %, {name}", "ms", ours, ideal, "ideal queue", target)


def _typical(waited: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the 99th percentile in ms."""
    return 1000 * fmean(waited), 1000 * quantiles(waited, n=100)[98]


def _serve(folder: Path, count: int, dice: Random) -> tuple[list[float], list[float]]:
    """Return when each task was submitted, and how long it waited: from then to its end, less its run."""
    arrivals: list[float] = []
    ends: list[Future[float]] = []
    with (
        Fleet(folder, "steady1", workers=WORKERS, sleep_s=LONG_S) as fleet,
        unpinned(),
        ThreadPoolExecutor(CALLERS) as callers,
    ):
        fleet.start()

        def end_of(task: str) -> float:
            fleet.wait(task)
            return time.perf_counter()

        for future in [callers.submit(end_of, fleet.submit([0.0])) for _ in range(2 * WORKERS)]:
            future.result()
        due = time.perf_counter()
        for _ in range(count):
            due += dice.expovariate(LOAD * WORKERS / LONG_S)
            time.sleep(max(0.0, due - time.perf_counter()))
            arrivals.append(time.perf_counter())
            ends.append(callers.submit(end_of, fleet.submit([0.0])))
        waited = [end.result() - at - LONG_S for end, at in zip(ends, arrivals, strict=True)]
    return arrivals, waited


def ideal_waits(arrivals: Sequence[float], service_s: float, servers: int) -> list[float]:
    """Return the waits in a queue whose head goes at once to whichever server is free first."""
    free = [float("-inf")] * servers
    waited: list[float] = []
    for at in arrivals:
        begun = max(at, free[0])
        heapreplace(free, begun + service_s)
        waited.append(begun - at)
    return waited
