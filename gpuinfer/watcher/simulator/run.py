# SPDX-License-Identifier: Apache-2.0
"""Lets a policy serve a trace, and measures the outcome."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.simulator.cluster import Cluster, Model
from gpuinfer.watcher.simulator.policy import Player
from gpuinfer.watcher.simulator.traces import Trace

#: Simulated for at most this long after the trace's end, until all tasks are served.
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
    settings: WatcherSettings = field(default_factory=WatcherSettings)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one policy served one trace."""

    policy: str
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
    #: (second, waiting, active, starting) at each probe.
    probes: Sequence[tuple[float, int, int, int]] = field(repr=False, default=())


def step_s(model: Model) -> float:
    """Return a step that is short compared with a batch."""
    return min(0.1, max(0.01, model.single_s / 2))


def play(scenario: Scenario, player: Player) -> Outcome:
    """Simulate until the trace is over and its last task done: GPU-seconds count until then."""
    trace = scenario.trace
    cluster = Cluster(scenario.gpus, scenario.model, trace.step_s, scenario.seed)
    player.begin(cluster)
    over, end = round(trace.seconds / trace.step_s), round((trace.seconds + TAIL_S) / trace.step_s)
    every = max(1, round(player.every_s / trace.step_s))
    arrivals = _merged(trace)
    arrival = next(arrivals, None)
    for step in range(end):
        if step >= over and cluster.served:
            break
        cluster.move_to(step)
        while arrival and arrival[0] == step:
            cluster.arrive(arrival[1], arrival[2])
            arrival = next(arrivals, None)
        cluster.claim()
        if step % every == 0:
            player.probe(cluster)
            cluster.log.probes.append(
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
    waits, step_s = cluster.log.waits, scenario.trace.step_s
    gpu_s = cluster.gpu_steps * step_s
    probes = cluster.log.probes
    return Outcome(
        policy=player.name,
        p50_s=quantile(waits, 0.5) * step_s,
        p99_s=quantile(waits, 0.99) * step_s,
        gpu_s=gpu_s,
        over_least=gpu_s / max(least(scenario), 1e-9),
        starts=cluster.log.starts,
        stops=cluster.log.stops,
        most=max((active + starting for _, _, active, starting in probes), default=0),
        unserved=unserved,
        probes=probes,
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
