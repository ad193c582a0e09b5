# SPDX-License-Identifier: Apache-2.0
"""What Redis knows: the depth of each queue, claims, tasks in flight, and which worker serves what.

The tasks that wait in a queue and those ever claimed from it are all that ever arrived. The oldest waiting
task is the one after all that were claimed; the watcher noted when it arrived, and reads no payload.

A running worker says in its heartbeat what it serves; of one that does not run, its host's watcher reads it
from the settings, and publishes it (``hosts``).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis

from gpuinfer.gpu_readings import Reading
from gpuinfer.queue import heartbeats
from gpuinfer.queue.connection import typed_errors
from gpuinfer.queue.depth import Depth, Lane
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.drained import DRAINED, FINISHING
from gpuinfer.queue.fleet import EVERYTHING, Serves, said
from gpuinfer.queue.later import move_due
from gpuinfer.settings import QUEUES
from gpuinfer.watcher.hosts import Hosts
from gpuinfer.watcher.state import Figures, Instance, Observation, QueueState

#: Rates for people are means over this time.
RATE_S = 10.0
#: Tasks that arrive soon after others, within this share of the oldest one's age, count as having arrived
#: with them: a backlog of hours takes little memory, and no age is too high by more than this share.
EXACT = 1 / 512


class Probe:
    """Probes Redis for one host's watcher. Blocking: call it in a thread."""

    def __init__(
        self,
        client: redis.Redis,
        host: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = 1.0,
        startup_s: float = 15.0,
        tell: bool = True,
    ) -> None:
        """``interval_s``: how often ``observe`` is called; ``startup_s``: how long a start takes until that
        was measured. Without ``tell`` it only reads."""
        self._client = client
        self._host = host
        self._startup_s = startup_s
        self._tells = tell
        self._clock = clock
        self._hosts = Hosts(client, host, clock, interval_s=interval_s, tell=tell)
        self._arrived: dict[Lane, deque[tuple[float, int]]] = {}
        #: Lane -> (when, how many had been claimed from it by then), lately.
        self._claimed: dict[Lane, deque[tuple[float, int]]] = {}
        #: What people are shown of the queues, from the last probe: ``tier.model`` -> ``oldest_s``, and
        #: ``rate``, the tasks a second that workers take.
        self._told_queues: dict[str, dict[str, float]] = {}
        #: What else they are shown: ``desired`` workers, how many are ``quarantined``, and ``why``.
        self.summary: Mapping[str, object] = {}

    def observe(
        self,
        own: Sequence[Instance],
        now: float,
        figures: Mapping[str, Figures] | None = None,
        gpus: Sequence[Reading] = (),
        *,
        told: Sequence[Instance] | None = None,
    ) -> Observation:
        """Publish our instances, figures and GPUs, and return what all watchers and Redis know.

        ``told``: our instances as they are published, where that differs. Raises BrokerUnavailable.
        """
        more = {"gpus": [*gpus], "queues": self._told_queues, **self.summary}
        with typed_errors():
            heard = self._hosts.exchange(own if told is None else told, now, figures or {}, more)
            names = [str(instance.key) for instance in (*own, *heard.instances)]
            if self._tells:
                move_due(self._client)
            depth = read_depth(self._client, names, ahead_s=self._startup(figures or {}))
            beats = heartbeats.fresh(self._client, names)
        beating = {name: said(body) for name, body in beats.items()}
        serving = {str(one.key): one.serves for one in (*own, *heard.instances)}
        serving |= {name: serves for name, serves in beating.items() if serves}
        queues = self._queues(depth, _in_lanes(depth, serving))
        self._told_queues = self._for_people(queues, depth.claimed)
        # All instances of this host; of others, those with a live watcher or a fresh heartbeat.
        there = (
            one for one in heard.instances if one.key.host in heard.live_hosts or str(one.key) in beating
        )
        missing = _missing(beats)
        drained = frozenset(name for name, body in beats.items() if body.get("state") in (FINISHING, DRAINED))
        instances = tuple(
            as_it_runs(one, depth.inflight, beating, missing, drained) for one in (*own, *there)
        )
        held: Counter[Serves] = Counter()
        for one in instances:
            held[one.serves] += depth.inflight.get(str(one.key), 0) if one.state == "active" else 0
        return Observation(
            queues=queues,
            instances=instances,
            held=held,
            host=self._host,
            live_hosts=heard.live_hosts,
            dead_letters=depth.dead_letters,
            figures=heard.figures,
            rival=heard.rival,
        )

    def _for_people(
        self, queues: Mapping[Lane, QueueState], claimed: Mapping[Lane, int]
    ) -> dict[str, dict[str, float]]:
        return {
            lane.name: {
                "oldest_s": round(queue.oldest_s, 1),
                "rate": round(self._rate(lane, claimed.get(lane, 0)), 3),
            }
            for lane, queue in queues.items()
            if queue.waiting or claimed.get(lane)
        }

    def _startup(self, figures: Mapping[str, Figures]) -> float:
        measured = [one.startup_s for one in figures.values() if one.startup_s is not None]
        return max(measured, default=self._startup_s)

    def _queues(self, depth: Depth, in_flight: Mapping[Lane, int]) -> dict[Lane, QueueState]:
        known = {depth.default_model, *depth.catalogue}
        lanes = {Lane(tier, model) for tier in QUEUES for model in known}
        lanes |= {*depth.lanes, *depth.claimed, *depth.due, *in_flight}
        queues: dict[Lane, QueueState] = {}
        for lane in sorted(lane for lane in lanes if lane.tier in QUEUES):
            waiting = sum(depth.lanes.get(lane, {}).values())
            claimed, held = depth.claimed.get(lane, 0), in_flight.get(lane, 0)
            queues[lane] = QueueState(
                waiting=waiting,
                in_flight=held,
                done=claimed - held,
                oldest_s=self._oldest(lane, waiting, claimed),
                due=depth.due.get(lane, 0),
                paused=depth.is_paused(lane),
            )
        return queues

    def _oldest(self, lane: Lane, waiting: int, claimed: int) -> float:
        """Return how long the first task after those that were claimed has waited, in seconds."""
        if not waiting:
            self._arrived.pop(lane, None)
            return 0.0
        arrived, now = self._arrived.setdefault(lane, deque()), self._clock()
        while arrived and arrived[0][1] <= claimed:
            arrived.popleft()
        total = waiting + claimed
        if not arrived or arrived[-1][1] < total:
            near = len(arrived) > 1 and now - arrived[-1][0] < EXACT * (now - arrived[0][0])
            arrived.append((arrived.pop()[0] if near else now, total))
        return now - arrived[0][0]

    def _rate(self, lane: Lane, claimed: int) -> float:
        """Return how many tasks a second workers have taken from a lane lately."""
        now = self._clock()
        known = self._claimed.setdefault(lane, deque())
        while known and claimed < known[-1][1]:  # put back, or Redis has come back empty
            known.pop()
        known.append((now, claimed))
        while len(known) > 2 and now - known[1][0] >= RATE_S:
            known.popleft()
        (since, before), (until, after) = known[0], known[-1]
        return (after - before) / (until - since) if until > since else 0.0


def _in_lanes(depth: Depth, serving: Mapping[str, Serves]) -> dict[Lane, int]:
    """Return the tasks in flight by lane; all that a worker holds count in one of its lanes.

    Only sums over all lanes that a worker serves are used, so the lane that each task came from is not read.
    """
    found: dict[Lane, int] = {}
    for worker, count in depth.inflight.items():
        serves = serving.get(worker, EVERYTHING)
        tier = "default" if "default" in serves.tiers else serves.tiers[0]
        model = depth.default_model
        if serves.models and model not in serves.models:
            model = serves.models[0]
        lane = Lane(tier, model)
        found[lane] = found.get(lane, 0) + count
    return found


def as_it_runs(
    instance: Instance,
    in_flight: Mapping[str, int],
    beating: Mapping[str, Serves | None],
    missing: Mapping[str, frozenset[str]],
    drained: Collection[str] = (),
) -> Instance:
    """Return an instance with what Redis knows of it: what it serves, and whether it is busy.

    One that does not run would serve what its settings name, except models that its host's workers cannot
    load: starting it for those would not help.
    """
    name = str(instance.key)
    if not instance.runs and instance.state != "deactivating":
        left = tuple(m for m in instance.serves.models if m not in missing.get(instance.key.host, ()))
        if not left or left == instance.serves.models:
            return instance
        return replace(instance, serves=instance.serves._replace(models=left))
    serves = beating.get(name) or instance.serves
    if instance.state != "active":
        return instance if serves == instance.serves else replace(instance, serves=serves)
    busy = True if in_flight.get(name) else (False if name in beating else None)
    return replace(instance, busy=busy, serves=serves, drained=name in drained)


def _missing(beats: Mapping[str, Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Return the models that live workers could not load, by host."""
    found: dict[str, frozenset[str]] = {}
    for worker, body in beats.items():
        names = body.get("missing")
        if isinstance(names, dict) and names:
            host = worker.partition("@")[2]
            found[host] = found.get(host, frozenset()) | frozenset(map(str, names))
    return found
