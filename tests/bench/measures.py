# SPDX-License-Identifier: Apache-2.0
"""What is measured, for both worlds: each function runs its repeats and yields lines of the table.

The worlds take turns, one repeat each, so that a noisy moment of the machine meets both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import median, quantiles

from tests.bench import bare
from tests.bench.lines import Line, Sizes, Target, compare
from tests.bench.machine import cpu_seconds, resident_mib
from tests.bench.models import STEADY_S_PER_ITEM, scalars, vectors
from tests.bench.stacks import Ours, Stock, World

# -- throughput ---------------------------------------------------------------------------


def throughput(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Work off a backlog that was there before the worker started; and the bare loops."""
    rates: dict[str, list[float]] = {"stock": [], "ours": [], "json": [], "orjson": []}
    model = folder / "models" / "perceptron" / "model.pt"
    for _ in range(sizes.repeats):
        rates["stock"].append(backlog(Stock(folder), vectors(sizes.stock_backlog)))
        rates["ours"].append(backlog(Ours(folder), vectors(sizes.backlog)))
        for codec in ("json", "orjson"):
            took = bare.seconds(model, sizes.backlog, 256, codec)
            rates[codec].append(sizes.backlog / took)
    ours = rates["ours"]
    goals = (("stock", "stock Celery", Target(op=">=", value=30)), ("json", "bare loop", _BARE))
    for key, beside, target in (*goals, ("orjson", "bare loop, orjson", None)):
        yield compare(f"backlog of {sizes.backlog:,}", "tasks/s", ours, rates[key], beside, target)


_BARE = Target(op=">=", value=0.6)


def backlog(world: World, values: Sequence[object]) -> float:
    """Submit everything, start the worker; return tasks a second."""
    with world:
        ids = world.submit_all(values)
        world.start(ready=False)  # or it would have begun before we look
        began, ended = world.drain(ids)
        return len(ids) / (ended - began)


def steady(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Work off a backlog for a model of 5 ms an item, in the largest batches and one by one."""
    for batch, most_idle, target in ((32, 1.5, Target(op=">=", value=0.97)), (1, 4.0, None)):
        ours, loop, name = [], [], f"steady{batch}"
        for _ in range(sizes.repeats):
            ours.append(backlog(Ours(folder, name), scalars(sizes.steady)))
            model = folder / "models" / name / "model.pt"
            loop.append(sizes.steady / bare.seconds(model, sizes.steady, batch))
        what = f"5 ms an item, batches of {batch}"
        yield compare(what, "tasks/s", ours, loop, "bare loop", target)
        idle = 100 * (1 - median(ours) * STEADY_S_PER_ITEM)
        limit = Target(op="<=", value=most_idle)
        yield Line(what="  device idle meanwhile", unit="%", ours=idle, target=limit)


# -- submission ---------------------------------------------------------------------------


def submission(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Submit with no worker about: ``submit_many``, ``submit``, and ``delay()`` in a loop."""
    many, one, delay = [], [], []
    values = vectors(sizes.submits)
    for _ in range(sizes.repeats):
        with Stock(folder) as stock:
            stock.submit(values[0])
            delay.append(_each(stock.submit, values))
        with Ours(folder) as ours:
            ours.submit(values[0])
            began = time.perf_counter()
            ours.submit_all(values)
            many.append((time.perf_counter() - began) / len(values))
            one.append(_each(ours.submit, values))
    rates = [1 / s for s in many], [1 / s for s in delay]
    yield compare("submit_many", "tasks/s", *rates, "delay() in a loop", Target(op=">=", value=20))
    times = [1e6 * s for s in one], [1e6 * s for s in delay]
    yield compare("submit, one", "us", *times, "delay()", Target(op="<=", value=0.5))


def _each(call: Callable[[object], object], values: Sequence[object]) -> float:
    """Return the seconds one call takes."""
    began = time.perf_counter()
    for value in values:
        call(value)
    return (time.perf_counter() - began) / len(values)


# -- latency ------------------------------------------------------------------------------


#: The shortest and the longest pause before a round trip: they fit no timer, and the worker has settled.
PAUSES_S = (0.002, 0.012)


def latency(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Submit one input to an idle worker and wait for its result, again and again.

    With a pause before each, everybody's caches are cold and a trip takes three times as long; one after
    another they are warm. Both have to reach the figures.
    """
    worlds = (Stock, Ours)
    paused: dict[str, list[tuple[float, float]]] = {world.name: [] for world in worlds}
    chained: dict[str, list[tuple[float, float]]] = {world.name: [] for world in worlds}
    for _ in range(sizes.repeats):
        for world in worlds:
            with world(folder) as running:
                running.start()
                gc.collect()
                gc.freeze()  # a full collection of this process, torch and all, takes 0.1 s
                paused[world.name].append(trips(running, sizes.trips, PAUSES_S))
                chained[world.name].append(trips(running, sizes.trips, (0, 0)))
    for found, kind, median_limit in ((paused, "", 0.5), (chained, ", no pause", 0.28)):
        for place, (name, limit) in enumerate((("p50", median_limit), ("p99", 0.3))):
            ours, other = ([pair[place] for pair in found[world.name]] for world in (Ours, Stock))
            target = Target(op="<=", value=limit)
            yield compare(f"idle round trip{kind}, {name}", "ms", ours, other, Stock.name, target)


def trips(world: World, count: int, pauses_s: tuple[float, float]) -> tuple[float, float]:
    """Return the median and the 99th percentile of round trips in ms."""
    random, took, warm_up = Random(2), [], 20  # noqa: S311  no secret
    for number, value in enumerate(vectors(count + warm_up)):
        time.sleep(random.uniform(*pauses_s))
        began = time.perf_counter()
        world.wait(world.submit(value))
        if number >= warm_up:
            took.append(1000 * (time.perf_counter() - began))
    return median(took), quantiles(took, n=100)[98]


# -- memory and rest ----------------------------------------------------------------------


def redis_memory(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Queue tasks of 64 floats; what Redis has used for each, result markers and all."""
    found: dict[str, list[float]] = {Stock.name: [], Ours.name: []}
    for _ in range(sizes.repeats):
        for world in (Stock, Ours):
            with world(folder) as queue:
                found[world.name].append(_bytes_each(queue, sizes.queued))
    target = Target(op="<=", value=1.0)
    ours, other = found[Ours.name], found[Stock.name]
    yield compare("Redis memory for a queued task", "bytes", ours, other, Stock.name, target)


def _bytes_each(world: World, count: int) -> float:
    values = vectors(count + 1)
    world.submit(values[0])  # what is there once (scripts, bindings) is none of a task's
    before = _used(world)
    world.submit_all(values[1:])
    return (_used(world) - before) / count


def _used(world: World) -> int:
    """Return what Redis uses once no client but ours is connected."""
    world.disconnect()
    time.sleep(0.3)
    info = world.raw.info("memory")
    used: int = info["used_memory"]
    return used


def worker_memory(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Run many tasks through one worker; its resident memory after the warm-up and in the end."""
    values = vectors(sizes.warm_up)
    with Ours(folder) as world:
        worker, seen = world.start(), []
        for _ in range(max(2, sizes.tasks_for_memory // sizes.warm_up)):
            ids = world.submit_all(values)
            world.drain(ids)
            world.forget(ids)
            seen.append(resident_mib(worker.pid))
    yield Line(
        what=f"resident after {sizes.tasks_for_memory:,} tasks",
        unit="MiB",
        ours=seen[-1],
        other=seen[0],
        beside=f"after {sizes.warm_up:,}",
        target=Target(op="<=", value=1.01),  # pages that come and go; a leak of 20 bytes a task shows
        repeats=(seen, ()),
    )


def idle(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Let a worker wait for work; how much of a core that takes."""
    shares: dict[str, float] = {}
    for world in (Stock, Ours):
        with world(folder) as waiting:
            pid = waiting.start().pid
            waiting.wait(waiting.submit(vectors(1)[0]))
            time.sleep(1)
            before = cpu_seconds(pid)
            time.sleep(sizes.idle_s)
            shares[world.name] = 100 * (cpu_seconds(pid) - before) / sizes.idle_s
    target = Target(op="<=", value=1.5)
    yield Line(what="idle worker", unit="% of a core", ours=shares[Ours.name], target=target)
    yield Line(what="  idle worker of stock Celery", unit="% of a core", ours=shares[Stock.name])
