# SPDX-License-Identifier: Apache-2.0
"""The watcher's policy in a simulation, with observations as its probe makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpuinfer.queue.depth import Lane
from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.policy import Decision, History, decide
from gpuinfer.watcher.simulator.cluster import Cluster
from gpuinfer.watcher.simulator.events import Event
from gpuinfer.watcher.state import Instance, Key, Observation, QueueState, UnitState

#: GPUs of each simulated host.
HOST_GPUS = 8


class Player(Protocol):
    """Probes a cluster every ``every_s`` seconds, and changes it."""

    name: str
    every_s: float

    def begin(self, cluster: Cluster) -> None:
        """Start what runs from the beginning."""

    def probe(self, cluster: Cluster) -> None:
        """Decide, and act."""


def begin(cluster: Cluster, workers: int) -> None:
    """Let some workers be ready from the beginning."""
    for instance in range(workers):
        cluster.active[instance] = 0
    cluster.idle = workers


class Policy:
    """The watcher's own policy."""

    def __init__(
        self,
        settings: WatcherSettings,
        *,
        name: str = "",
        events: Sequence[Event] = (),
    ) -> None:
        """``events``: what happens to workers from outside."""
        self.name = name or settings.mode
        self.every_s = settings.probe_interval_s
        self.history = History()
        self.decision: Decision | None = None
        self._settings = settings
        self._events = sorted(events, reverse=True)
        self._keys: list[Key] = []
        self._probed_at = -1
        self._failing: set[int] = set()
        self._masked: set[int] = set()
        #: Worker -> the second at which it failed or was stopped.
        self._failed: dict[int, float] = {}
        self._stopped: dict[int, float] = {}

    def begin(self, cluster: Cluster) -> None:
        """Let the floor be ready."""
        keys = [Key(i % HOST_GPUS, f"h{i // HOST_GPUS:05}") for i in range(cluster.gpus)]
        # Instances are started in the order of keys: number first, so that hosts share the load.
        self._keys = sorted(keys)
        begin(cluster, min(self._settings.floor, cluster.gpus))

    def probe(self, cluster: Cluster) -> None:
        """Apply the events that are due, decide as the watcher does, and act."""
        while self._events and self._events[-1].second <= cluster.now:
            self._happen(cluster, self._events.pop())
        for gpu in [gpu for gpu in cluster.active if gpu in self._failing]:
            self._fail(cluster, gpu)
        seen = self._observe(cluster)
        self.decision = decide(seen, self.history, self._settings, cluster.now)
        self.history = self.decision.history
        place = {key: gpu for gpu, key in enumerate(self._keys)}
        for action in self.decision.actions:
            self._act(cluster, action.verb == "start", place[action.key])

    def _happen(self, cluster: Cluster, event: Event) -> None:
        gpu = event.gpu
        if event.what in ("fail", "recover"):
            (self._failing.add if event.what == "fail" else self._failing.discard)(gpu)
        elif event.what in ("mask", "unmask"):
            (self._masked.add if event.what == "mask" else self._masked.discard)(gpu)
        elif (event.what == "start") != cluster.runs(gpu):
            self._act(cluster, event.what == "start", gpu)

    def _act(self, cluster: Cluster, start: bool, gpu: int) -> None:
        self._failed.pop(gpu, None)
        if start:
            cluster.start(gpu)
        else:
            cluster.stop(gpu)
            self._stopped[gpu] = cluster.now

    def _fail(self, cluster: Cluster, gpu: int) -> None:
        cluster.stop(gpu)
        self._failed[gpu] = cluster.now

    def _observe(self, cluster: Cluster) -> Observation:
        queues = {
            Lane(name, ""): QueueState(
                waiting=cluster.waiting[place],
                in_flight=cluster.in_flight[place],
                done=cluster.done[place],
                oldest_s=cluster.oldest_s(place),
            )
            for place, name in enumerate(QUEUES)
        }
        # A worker that became ready since the last probe has not claimed anything yet: idle.
        settled = [gpu for gpu, ready in cluster.active.items() if ready <= self._probed_at]
        self._probed_at = cluster.step
        busy = set([*cluster.active][: cluster.busy]) & {*settled}
        instances = (self._instance(cluster, gpu, gpu in busy) for gpu in range(cluster.gpus))
        return Observation(queues=queues, instances=tuple(instances))

    def _instance(self, cluster: Cluster, gpu: int, busy: bool) -> Instance:
        state: UnitState = "inactive"
        since = self._stopped.get(gpu, 0.0)
        if gpu in cluster.active:
            state, since = "active", cluster.active[gpu] * cluster.step_s
        elif gpu in cluster.starting:
            state, since = "activating", cluster.starting[gpu] * cluster.step_s
        elif gpu in self._failed:
            state, since = "failed", self._failed[gpu]
        return Instance(key=self._keys[gpu], state=state, since=since, busy=busy, masked=gpu in self._masked)
