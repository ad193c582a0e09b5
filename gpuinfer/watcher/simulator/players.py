# SPDX-License-Identifier: Apache-2.0
"""Who decides: our policy, and the formulas of the usual tutorial, of KEDA and of the HPA.

Each is called every ``every_s`` seconds of simulated time. All have the same floor and ceiling, but
for two that cannot reach zero: a tutorial's script needs a worker to begin with, and an HPA has at least one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Protocol

from gpuinfer.queue.depth import Lane
from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.policy import History, decide
from gpuinfer.watcher.simulator.cluster import Cluster
from gpuinfer.watcher.state import Instance, Key, Observation, QueueState, UnitState


class Player(Protocol):
    """Looks at the fleet now and then, and changes it."""

    name: str
    every_s: float

    def begin(self, cluster: Cluster) -> None:
        """Start what runs from the beginning on."""

    def look(self, cluster: Cluster) -> None:
        """Decide, and act."""


def _begin(cluster: Cluster, workers: int) -> None:
    """Have the floor ready at the beginning, for all alike."""
    for instance in range(workers):
        cluster.active[instance] = 0
    cluster.idle = workers


class Ours:
    """The watcher's policy, with observations as its probe would make them."""

    name = "gpuinfer"

    def __init__(self, settings: WatcherSettings, gpus_per_host: int = 8) -> None:
        self.every_s = settings.probe_interval_s
        self._settings = settings
        self._per_host = gpus_per_host
        self.history = History()
        self._instances: list[Instance] = []
        self._place: dict[Key, int] = {}
        #: Active instances in the order they became so; the first of them are taken to be the busy ones.
        self._order: list[int] = []
        self._version: tuple[int, int, int] | None = None
        self._busy = 0
        self._looked_at = -1

    def begin(self, cluster: Cluster) -> None:
        """Have the floor ready."""
        keys = [Key(i % self._per_host, f"h{i // self._per_host:05}") for i in range(cluster.gpus)]
        # The order of starting is that of keys: number first, so that hosts share the load.
        keys.sort()
        self._place = {key: place for place, key in enumerate(keys)}
        self._instances = [Instance(key=key) for key in keys]
        _begin(cluster, min(self._settings.floor, cluster.gpus))

    def look(self, cluster: Cluster) -> None:
        """Decide with the very policy of the watcher, and do what it says."""
        seen = self._observe(cluster)
        decision = decide(seen, self.history, self._settings, cluster.now)
        self.history = decision.history
        for action in decision.actions:
            place = self._place[action.key]
            (cluster.start if action.verb == "start" else cluster.stop)(place)

    def _observe(self, cluster: Cluster) -> Observation:
        self._mark(cluster)
        queues = {
            Lane(name, ""): QueueState(
                waiting=cluster.waiting[place],
                in_flight=cluster.in_flight[place],
                done=cluster.done[place],
                oldest_s=cluster.oldest_s(place),
            )
            for place, name in enumerate(QUEUES)
        }
        return Observation(queues=queues, instances=tuple(self._instances))

    def _mark(self, cluster: Cluster) -> None:
        """Bring the instances up to date; only those that have changed are rebuilt."""
        version = (cluster.log.starts, cluster.log.stops, len(cluster.active))
        if version != self._version:
            self._order = list(cluster.active)
            self._busy = cluster.busy
            # Who became ready since the last look is seen between READY and its first claim: idle.
            fresh = {place for place, ready in cluster.active.items() if ready > self._looked_at}
            self._version = None if fresh else version
            self._looked_at = cluster.step
            self._mark_all(cluster, fresh)
            return
        self._looked_at = cluster.step
        low, high = sorted((self._busy, cluster.busy))
        for place in self._order[low:high]:
            old = self._instances[place]
            self._instances[place] = replace(old, busy=cluster.busy > self._busy)
        self._busy = cluster.busy

    def _mark_all(self, cluster: Cluster, fresh: set[int]) -> None:
        busy = set(self._order[: self._busy]) - fresh
        for place, old in enumerate(self._instances):
            state: UnitState = "inactive"
            since = old.since
            if place in cluster.active:
                state, since = "active", cluster.active[place] * cluster.step_s
            elif place in cluster.starting:
                state, since = "activating", cluster.starting[place] * cluster.step_s
            if old.state != state or old.busy != (place in busy):
                self._instances[place] = Instance(key=old.key, state=state, since=since, busy=place in busy)


class Tutorial:
    """``if LLEN > 50 and workers < 4: start one more``, every 10 s; it never stops one."""

    name = "tutorial"
    every_s = 10.0

    def __init__(self, floor: int, ceiling: int) -> None:
        self._floor, self._ceiling = max(1, floor), min(4, ceiling)

    def begin(self, cluster: Cluster) -> None:
        """Have one worker at least: below 51 tasks it would start none."""
        _begin(cluster, self._floor)

    def look(self, cluster: Cluster) -> None:
        """Start one more, or do nothing."""
        if cluster.total_waiting > 50 and cluster.running < self._ceiling:
            cluster.scale_to(cluster.running + 1)


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
        _begin(cluster, self._floor)

    def look(self, cluster: Cluster) -> None:
        """Poll every second time, and sync the HPA where there is a replica."""
        now, replicas, waiting = cluster.now, cluster.running, cluster.total_waiting
        polls = self._syncs % 2 == 0
        self._syncs += 1
        if polls and waiting:
            self._active_at = now
        if replicas == 0:
            cluster.scale_to(int(polls and waiting > 0))
        elif polls and self._floor == 0 and not waiting and now - self._active_at >= 300.0:
            cluster.scale_to(0)
        else:
            cluster.scale_to(self._sync(now, replicas, waiting))

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
        _begin(cluster, self._floor)

    def look(self, cluster: Cluster) -> None:
        """Sync; what is not ready yet counts as idle."""
        passed = max(1, cluster.step - self._step)
        busy = (cluster.busy_steps - self._busy_steps) / passed
        self._busy_steps, self._step = cluster.busy_steps, cluster.step
        replicas = cluster.running
        ratio = busy / (self.target * replicas)
        desired = replicas if abs(ratio - 1) <= 0.1 else math.ceil(busy / self.target)
        desired = max(self._floor, min(desired, self._ceiling))
        cluster.scale_to(self._stable.limit(cluster.now, replicas, desired))


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
        _begin(cluster, self._floor)

    def look(self, cluster: Cluster) -> None:
        """Start everything as soon as there is any work."""
        if cluster.total_waiting or cluster.log.starts:
            cluster.scale_to(self._ceiling)
