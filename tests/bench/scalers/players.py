# SPDX-License-Identifier: Apache-2.0
"""The formulas of others: the usual tutorial's script, KEDA and the HPA.

Each is called every ``every_s`` seconds of simulated time. All have the same floor and ceiling, but
for two that cannot reach zero: a tutorial's script needs a worker to begin with, and an HPA has at least one.
"""

from __future__ import annotations

import math
from collections import deque

from gpuinfer.watcher.simulator.cluster import Cluster
from gpuinfer.watcher.simulator.policy import Player, Policy, begin
from gpuinfer.watcher.simulator.run import Outcome, Scenario, play


def scale_to(cluster: Cluster, workers: int) -> None:
    """Start or stop as a replica count does: the last started go first."""
    if workers > cluster.running:
        free = (gpu for gpu in range(cluster.gpus) if not cluster.runs(gpu))
        for _, gpu in zip(range(workers - cluster.running), free, strict=False):
            cluster.start(gpu)
    while workers < cluster.running:
        cluster.stop(next(reversed(cluster.starting or cluster.active)))


class Tutorial:
    """``if LLEN > 50 and workers < 4: start one more``, every 10 s; it never stops one."""

    name = "tutorial"
    every_s = 10.0

    def __init__(self, floor: int, ceiling: int) -> None:
        self._floor, self._ceiling = max(1, floor), min(4, ceiling)

    def begin(self, cluster: Cluster) -> None:
        """Have one worker at least: below 51 tasks it would start none."""
        begin(cluster, self._floor)

    def probe(self, cluster: Cluster) -> None:
        """Start one more, or do nothing."""
        if cluster.total_waiting > 50 and cluster.running < self._ceiling:
            scale_to(cluster, cluster.running + 1)


class Stabiliser:
    """The HPA's default behaviour: up by 4 or to twice as many every 15 s; down to the most of 300 s."""

    def __init__(self) -> None:
        self._asked: deque[tuple[float, int]] = deque()

    def limit(self, now: float, current: int, desired: int) -> int:
        """Return what of ``desired`` replicas is done now."""
        self._asked.append((now, desired))
        while self._asked[0][0] < now - 300.0:
            self._asked.popleft()
        if desired > current:
            return min(desired, max(2 * current, current + 4))
        return min(current, max(asked for _, asked in self._asked))


class Keda:
    """KEDA's Redis list scaler: ceil(waiting / 5), through the HPA it makes; to and from zero by itself.

    Defaults: listLength 5, pollingInterval 30 s (0 to 1 only), cooldownPeriod 300 s (to 0 only); the HPA
    syncs every 15 s and leaves a difference of 10 % alone.
    """

    name = "keda"
    every_s = 15.0
    list_length = 5

    def __init__(self, floor: int, ceiling: int) -> None:
        self._floor, self._ceiling = floor, ceiling
        self._stable = Stabiliser()
        self._active_at = 0.0
        self._syncs = 0

    def begin(self, cluster: Cluster) -> None:
        """Have the floor ready."""
        begin(cluster, self._floor)

    def probe(self, cluster: Cluster) -> None:
        """Poll every second time, and sync the HPA where there is a replica."""
        now, replicas, waiting = cluster.now, cluster.running, cluster.total_waiting
        polls = self._syncs % 2 == 0
        self._syncs += 1
        if polls and waiting:
            self._active_at = now
        if replicas == 0:
            scale_to(cluster, int(polls and waiting > 0))
        elif polls and self._floor == 0 and not waiting and now - self._active_at >= 300.0:
            scale_to(cluster, 0)
        else:
            scale_to(cluster, self._sync(now, replicas, waiting))

    def _sync(self, now: float, replicas: int, waiting: int) -> int:
        ratio = waiting / (self.list_length * replicas)
        desired = replicas if abs(ratio - 1) <= 0.1 else math.ceil(waiting / self.list_length)
        desired = max(1, self._floor, min(desired, self._ceiling))
        return self._stable.limit(now, replicas, desired)


class Hpa:
    """The HPA's own default metric: utilisation, with a target of 80 %; ceil(busy / 0.8) replicas."""

    name = "hpa"
    every_s = 15.0
    target = 0.8

    def __init__(self, floor: int, ceiling: int) -> None:
        self._floor, self._ceiling = max(1, floor), ceiling
        self._stable = Stabiliser()
        self._busy_steps = 0
        self._step = 0

    def begin(self, cluster: Cluster) -> None:
        """Have the least an HPA can have, which is one."""
        begin(cluster, self._floor)

    def probe(self, cluster: Cluster) -> None:
        """Sync; what is not ready yet counts as idle."""
        passed = max(1, cluster.step - self._step)
        busy = (cluster.busy_steps - self._busy_steps) / passed
        self._busy_steps, self._step = cluster.busy_steps, cluster.step
        replicas = cluster.running
        ratio = busy / (self.target * replicas)
        desired = replicas if abs(ratio - 1) <= 0.1 else math.ceil(busy / self.target)
        desired = max(self._floor, min(desired, self._ceiling))
        scale_to(cluster, self._stable.limit(cluster.now, replicas, desired))


class AllAtOnce:
    """No policy but a bound: starts everything when the first task waits, and never stops anything.

    A policy that does not know the future cannot have shorter waiting times from the same floor.
    """

    name = "bound"
    every_s = 1.0

    def __init__(self, floor: int, ceiling: int) -> None:
        self._floor, self._ceiling = floor, ceiling

    def begin(self, cluster: Cluster) -> None:
        """Have the floor ready."""
        begin(cluster, self._floor)

    def probe(self, cluster: Cluster) -> None:
        """Start everything as soon as there is any work."""
        if cluster.total_waiting or cluster.log.starts:
            scale_to(cluster, self._ceiling)


def players(scenario: Scenario) -> list[Player]:
    """Return all players for a scenario, ours first, the bound last."""
    floor, ceiling = scenario.floor, scenario.gpus
    settings = scenario.settings.model_copy(update={"floor": floor, "ceiling": ceiling})
    ours = Policy(settings, name="gpuinfer")
    peers: list[Player] = [Tutorial(floor, ceiling), Keda(floor, ceiling), Hpa(floor, ceiling)]
    return [ours, *peers, AllAtOnce(floor, ceiling)]


def compare(scenario: Scenario) -> list[Outcome]:
    """Let all players serve the same trace."""
    return [play(scenario, player) for player in players(scenario)]
