# SPDX-License-Identifier: Apache-2.0
"""What Redis knows: the depth of each queue, claims, tasks in flight, and the instances of other hosts.

The tasks waiting in a queue and those ever claimed from it are all that ever arrived. The oldest waiting
task is the one after all that were claimed; the watcher has seen itself when it came, and reads no payload.

A running worker says in its heartbeat what it serves; for one that does not run, its host's watcher knows
it from the settings, and tells.

Watchers tell each other about their instances in one hash. Another one is alive while its counter goes up,
on our own clock, and at first sight by its age on Redis's clock; two hosts' clocks need not agree.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson
import redis

from gpuinfer.gpu_readings import Reading
from gpuinfer.log import get_logger
from gpuinfer.queue import heartbeats
from gpuinfer.queue.connection import typed_errors
from gpuinfer.queue.depth import Depth, Lane
from gpuinfer.queue.depth import look as look_at_queues
from gpuinfer.queue.drained import DRAINED, FINISHING
from gpuinfer.queue.fleet import EVERYTHING, HOSTS, Serves, said, silent_after, told
from gpuinfer.queue.later import move_due
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QUEUES
from gpuinfer.watcher.state import (
    Figures,
    Instance,
    Key,
    QueueState,
)

log = get_logger(__name__)

DECISIONS = "gpuinfer:watcher:decisions"
MEMORY_PREFIX = "gpuinfer:watcher:memory:"
#: Forget a watcher that has been silent for this long.
FORGOTTEN_S = 3600.0
#: Rates for people are means over this time.
RATE_S = 10.0
#: For each lane, this many moments at most are remembered when waiting tasks came. Then every second one is
#: dropped, and its tasks are taken to have come at the one before: the oldest stay exact, and no age is too
#: high by more than 1/512 of the time in which the backlog came.
MOMENTS = 1024


@dataclass(frozen=True, slots=True)
class Seen:
    """What one probe of Redis has shown."""

    queues: dict[Lane, QueueState]
    #: Worker (``gpu0@host``) -> tasks in flight.
    in_flight: Mapping[str, int]
    #: Worker with a fresh heartbeat -> what it says it serves; None: it does not say.
    beating: Mapping[str, Serves | None]
    remote: tuple[Instance, ...]
    live_hosts: frozenset[str]
    dead_letters: int
    #: What the other live hosts' watchers have measured.
    figures: Mapping[str, Mapping[str, Figures]]
    #: Those of them that claim nothing: drained, or stopping.
    drained: frozenset[str] = frozenset()
    #: Host -> models that a live worker there could not load: no other worker there could either.
    missing: Mapping[str, frozenset[str]] = field(default_factory=dict)
    #: The process token of another watcher that tells of instances under our host's name; empty: none.
    rival: str = ""


@dataclass(slots=True)
class _Other:
    beat: int
    moved_at: float


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
        """``interval_s``: how often ``look`` is called; ``startup_s``: how long a start takes, until that was
        measured. Without ``tell`` it listens, and writes nothing."""
        self._client = client
        self._interval_s = interval_s
        self._startup_s = startup_s
        self._tells = tell
        self._token = secrets.token_hex(8)
        self._has_told = False
        self._share = bind(client, "tell")
        self._host = host
        self._clock = clock
        self._others: dict[str, _Other] = {}
        self._arrived: dict[Lane, deque[tuple[float, int]]] = {}
        self._garbled: set[str] = set()
        self._beat = int(time.time() * 1000)
        #: Lane -> when how much had been claimed from it, lately.
        self._claimed: dict[Lane, deque[tuple[float, int]]] = {}
        #: What people are shown of the queues, as the last look has found it: ``tier.model`` -> ``oldest_s``
        #: and ``rate``, the tasks a second that workers take.
        self._told_queues: dict[str, dict[str, float]] = {}
        #: What else they are shown: ``desired`` workers, how many are ``quarantined``, and ``why``.
        self.summary: Mapping[str, object] = {}

    def look(
        self,
        own: list[Instance],
        now: float,
        figures: Mapping[str, Figures] | None = None,
        gpus: Sequence[Reading] = (),
    ) -> Seen:
        """Tell the others of our instances, figures and GPUs, and look at everything.

        Raises BrokerUnavailable.
        """
        with typed_errors():
            told, redis_now, rival = self._tell(own, now, figures, gpus)
            remote, live, theirs = self._hear(told, redis_now, now)
            names = [str(instance.key) for instance in (*own, *remote)]
            if self._tells:
                move_due(self._client)
            depth = look_at_queues(self._client, names, ahead_s=self._startup(figures or {}))
            beats = heartbeats.fresh(self._client, names)
        beating = {name: said(body) for name, body in beats.items()}
        serving = {str(one.key): one.serves for one in (*own, *remote)}
        serving |= {name: serves for name, serves in beating.items() if serves}
        queues = self._queues(depth, _in_lanes(depth, serving))
        self._told_queues = {
            f"{lane.tier}.{lane.model}": {
                "oldest_s": round(queue.oldest_s, 1),
                "rate": round(self._rate(lane, depth.claimed.get(lane, 0)), 3),
            }
            for lane, queue in queues.items()
            if queue.waiting or depth.claimed.get(lane)
        }
        # Of a silent host, count only workers with a fresh heartbeat.
        there = (one for one in remote if one.key.host in live or str(one.key) in beating)
        missing = _missing(beats)
        drained = frozenset(name for name, body in beats.items() if body.get("state") in (FINISHING, DRAINED))
        marked = tuple(as_it_runs(one, depth.inflight, beating, missing, drained) for one in there)
        return Seen(
            queues,
            depth.inflight,
            beating,
            marked,
            live,
            depth.dead_letters,
            theirs,
            drained,
            missing,
            rival=rival,
        )

    def _startup(self, figures: Mapping[str, Figures]) -> float:
        measured = [one.startup_s for one in figures.values() if one.startup_s is not None]
        return max(measured, default=self._startup_s)

    def _tell(
        self,
        own: list[Instance],
        now: float,
        figures: Mapping[str, Figures] | None,
        gpus: Sequence[Reading],
    ) -> tuple[dict[bytes, bytes], float, str]:
        """Tell the others; return what all tell, Redis's time, and who else has our name."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hgetall(HOSTS) if not self._tells else pipe.hget(HOSTS, self._host)
            (seconds, microseconds), found = pipe.execute()
        redis_now = seconds + microseconds / 1e6
        if not self._tells:
            return found, redis_now, ""
        token = _token_of(found)
        rival = token if self._has_told and token != self._token else ""
        self._beat += 1
        body = {
            "token": self._token,
            "beat": self._beat,
            "at": redis_now,
            "interval_s": self._interval_s,
            "figures": {name: asdict(measured) for name, measured in (figures or {}).items()},
            "instances": [_told(instance, now) for instance in own],
            "gpus": [*gpus],
            "queues": self._told_queues,
            **self.summary,
        }
        flat: list[bytes] = self._share(keys=[HOSTS], args=[self._host, orjson.dumps(body)])
        self._has_told = True
        return dict(zip(flat[::2], flat[1::2], strict=True)), redis_now, rival

    def _hear(
        self, told: Mapping[bytes, bytes], redis_now: float, now: float
    ) -> tuple[tuple[Instance, ...], frozenset[str], dict[str, Mapping[str, Figures]]]:
        instances: list[Instance] = []
        live = {self._host}
        figures: dict[str, Mapping[str, Figures]] = {}
        for name, text in told.items():
            host = name.decode(errors="replace")
            if host == self._host:
                continue
            try:
                body = orjson.loads(text)
                theirs = [_heard(host, one, now) for one in body["instances"]]
                measured = {name: _figures(one) for name, one in (body.get("figures") or {}).items()}
                beat = body["beat"]
                age_s = max(0.0, redis_now - float(body.get("at", redis_now)))
                limit_s = silent_after(body)
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                if host not in self._garbled:
                    log.warning("host_unreadable", host=host, reason=f"{type(exc).__name__}: {exc}")
                self._garbled.add(host)
                continue
            self._garbled.discard(host)
            other = self._others.setdefault(host, _Other(beat, self._clock() - age_s))
            if other.beat != beat:
                other.beat, other.moved_at = beat, self._clock()
            silent_s = self._clock() - other.moved_at
            if silent_s > FORGOTTEN_S:
                if self._tells:
                    self._client.hdel(HOSTS, host)
                del self._others[host]
                continue
            if silent_s <= limit_s:
                live.add(host)
                figures |= {host: measured} if measured else {}
            instances += theirs
        return tuple(instances), frozenset(live), figures

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
        if not arrived or arrived[-1][1] < waiting + claimed:
            arrived.append((now, waiting + claimed))
        if len(arrived) > MOMENTS:
            self._arrived[lane] = arrived = thinned(arrived)
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


def thinned(arrived: deque[tuple[float, int]]) -> deque[tuple[float, int]]:
    """Return half as many moments: of each two, the earlier moment with the later count."""
    pairs = [*arrived]
    early, late = pairs[::2], pairs[1::2]
    kept = [(at, count) for (at, _), (_, count) in zip(early, late, strict=False)]
    return deque([*kept, *early[len(late) :]])


def _in_lanes(depth: Depth, serving: Mapping[str, Serves]) -> dict[Lane, int]:
    """Return what is in flight by lane: all that a worker holds in one of its lanes.

    Which of its lanes each task came from is not looked for; only sums over all that one serves are used.
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
    """Return an instance with what Redis knows of it, if it runs: what it serves, and whether it is busy.

    One that does not run would serve what its settings name, without what its host's workers cannot load:
    to start it for that would be in vain.
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


def _token_of(text: bytes | None) -> str:
    """Return the token of the watcher process that wrote an entry; empty where it has none."""
    try:
        return str(orjson.loads(text or b"{}").get("token", ""))
    except (ValueError, AttributeError):
        return ""


def _figures(told: Mapping[str, Any]) -> Figures:
    """Return what another watcher has measured."""
    served, startup_s = told["served"], told["startup_s"]
    return Figures(
        served=None if served is None else float(served),
        worked=max(float(told["worked"]), 1e-6),
        known=bool(told["known"]),
        startup_s=None if startup_s is None else float(startup_s),
    )


def _told(instance: Instance, now: float) -> dict[str, object]:
    return {
        "number": instance.key.number,
        "state": instance.state,
        "age_s": round(now - instance.since, 3),
        "enabled": instance.enabled,
        "masked": instance.masked,
        "hold": instance.hold,
        "excluded": instance.excluded,
        "log_only": instance.log_only,
        "tiers": instance.serves.tiers,
        "models": instance.serves.models,
    }


def _heard(host: str, one: Mapping[str, Any], now: float) -> Instance:
    return Instance(
        key=Key(int(str(one["number"])), host),
        state=one["state"],
        since=now - float(str(one["age_s"])),
        enabled=bool(one["enabled"]),
        masked=bool(one["masked"]),
        hold=one["hold"],
        excluded=str(one["excluded"]),
        log_only=bool(one.get("log_only")),
        serves=told(one),
    )
