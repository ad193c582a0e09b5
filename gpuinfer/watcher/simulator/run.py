# SPDX-License-Identifier: Apache-2.0
"""Let a player serve a trace, and measure what came of it."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.simulator.cluster import Cluster, Model
from gpuinfer.watcher.simulator.players import AllAtOnce, Hpa, Keda, Ours, Player, Tutorial
from gpuinfer.watcher.simulator.traces import Trace

#: Simulated at most after the trace's end, until what is left is served.
TAIL_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One trace and the fleet that serves it."""

    name: str
    trace: Trace
    gpus: int
    floor: int = 0
    model: Model = field(default_factory=Model)
    seed: int = 1
    gpus_per_host: int = 8
    settings: WatcherSettings = field(default_factory=WatcherSettings)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one player serving one trace."""

    player: str
    p50_s: float
    p99_s: float
    gpu_s: float
    #: GPU-seconds over the least possible: all tasks in full batches, and nothing else.
    over_least: float
    starts: int
    stops: int
    most: int
    #: Tasks that still waited at the very end.
    unserved: int
    #: (second, waiting, active, starting) at each look.
    looks: Sequence[tuple[float, int, int, int]] = field(repr=False, default=())


def players(scenario: Scenario) -> list[Player]:
    """Return all players for a scenario, ours first, the bound last."""
    floor, ceiling = scenario.floor, scenario.gpus
    settings = replace_settings(scenario.settings, floor, ceiling)
    peers: list[Player] = [Tutorial(floor, ceiling), Keda(floor, ceiling), Hpa(floor, ceiling)]
    return [Ours(settings, scenario.gpus_per_host), *peers, AllAtOnce(floor, ceiling)]


def replace_settings(settings: WatcherSettings, floor: int, ceiling: int) -> WatcherSettings:
    """Give our policy the floor and the ceiling that all have."""
    return settings.model_copy(update={"floor": floor, "ceiling": ceiling})


def play(scenario: Scenario, player: Player) -> Outcome:
    """Simulate one player until the trace is over and its last task done: GPU-seconds count till then."""
    trace = scenario.trace
    cluster = Cluster(scenario.gpus, scenario.model, trace.step_s, scenario.seed)
    player.begin(cluster)
    over, end = round(trace.seconds / trace.step_s), round((trace.seconds + TAIL_S) / trace.step_s)
    every = max(1, round(player.every_s / trace.step_s))
    arrivals = _merged(trace)
    arrival = next(arrivals, None)
    look = 0
    while True:
        ahead = over if cluster.served else end
        step = min(look, arrival[0] if arrival else ahead, cluster.calendar[0] if cluster.calendar else ahead)
        if step >= ahead:
            break
        cluster.move_to(step)
        while arrival and arrival[0] == step:
            cluster.arrive(arrival[1], arrival[2])
            arrival = next(arrivals, None)
        cluster.claim()
        if step == look:
            player.look(cluster)
            look += every
            cluster.log.looks.append(
                (cluster.now, cluster.total_waiting, len(cluster.active), len(cluster.starting))
            )
    cluster.move_to(max(cluster.step, over) if cluster.served else end)
    return _outcome(scenario, player, cluster)


def _merged(trace: Trace) -> Iterator[tuple[int, int, int]]:
    """Yield (step, queue's place, tasks) in the order of time."""
    lines = [
        zip(steps.tolist(), [QUEUES.index(queue)] * len(steps), counts.tolist(), strict=True)
        for queue, (steps, counts) in trace.arrivals.items()
    ]
    return heapq.merge(*lines) if len(lines) > 1 else iter(lines[0] if lines else ())


def _outcome(scenario: Scenario, player: Player, cluster: Cluster) -> Outcome:
    unserved = cluster.total_waiting
    cluster.give_up()
    waits: Counter[int] = sum(cluster.log.waits, Counter())
    step_s = scenario.trace.step_s
    gpu_s = cluster.gpu_steps * step_s
    looks = cluster.log.looks
    return Outcome(
        player=player.name,
        p50_s=quantile(waits, 0.5) * step_s,
        p99_s=quantile(waits, 0.99) * step_s,
        gpu_s=gpu_s,
        over_least=gpu_s / max(least(scenario), 1e-9),
        starts=cluster.log.starts,
        stops=cluster.log.stops,
        most=max((active + starting for _, _, active, starting in looks), default=0),
        unserved=unserved,
        looks=looks,
    )


def least(scenario: Scenario) -> float:
    """Return the least GPU-seconds possible: every task in a full batch, no start, no idle moment."""
    return scenario.trace.tasks / scenario.model.rate


def quantile(waits: Counter[int], share: float) -> int:
    """Return the least wait that at least ``share`` of the tasks did not exceed."""
    left = share * waits.total()
    for wait in sorted(waits):
        left -= waits[wait]
        if left <= 1e-9:
            return wait
    return 0


def compare(scenario: Scenario) -> list[Outcome]:
    """Let all players serve the same trace."""
    return [play(scenario, player) for player in players(scenario)]


def renamed(scenario: Scenario, name: str) -> Scenario:
    """Return the scenario under another name."""
    return replace(scenario, name=name)
