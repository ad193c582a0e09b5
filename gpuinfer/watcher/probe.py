# SPDX-License-Identifier: Apache-2.0
"""What Redis knows: depth, claims and flight of each queue, and the instances of the other hosts.

What waits in a queue plus what was ever claimed from it is what ever arrived. The oldest task that waits
is the one after all that were claimed; when it came, the watcher has seen itself: no payload is read.

Watchers tell each other about their instances in one hash. Whether another one lives is told by its
count going on, on our own clock, and at first sight by its age on Redis's; two hosts' clocks need not agree.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import orjson
import redis

from gpuinfer.log import get_logger
from gpuinfer.queue import beats, keys
from gpuinfer.queue.connection import typed_errors
from gpuinfer.queue.depth import Depth
from gpuinfer.queue.depth import look as look_at_queues
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QUEUES
from gpuinfer.watcher.state import Figures, Instance, Key, QueueState

log = get_logger(__name__)

HOSTS = "gpuinfer:watcher:hosts"
DECISIONS = "gpuinfer:watcher:decisions"
MEMORY_PREFIX = "gpuinfer:watcher:memory:"
#: A watcher is silent when its count has stood still for so long, or for so many of its own looks; after an
#: hour it is forgotten.
SILENT_S = 10.0
SILENT_LOOKS = 3.0
FORGOTTEN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at Redis has shown."""

    queues: dict[str, QueueState]
    #: Worker (``gpu0@host``) -> tasks in flight.
    in_flight: Mapping[str, int]
    #: Workers with a fresh heartbeat.
    beating: frozenset[str]
    remote: tuple[Instance, ...]
    live_hosts: frozenset[str]
    dead_letters: int
    #: What the other live hosts' watchers have measured.
    figures: Mapping[str, Figures]
    #: Which life of a watcher, not ours, tells of instances under our host's name; empty: none.
    rival: str = ""


@dataclass(slots=True)
class _Other:
    beat: int
    moved_at: float


class Probe:
    """Looks at Redis for one host's watcher. Blocking: call it in a thread."""

    def __init__(
        self,
        client: redis.Redis,
        host: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = 1.0,
        tell: bool = True,
    ) -> None:
        """``interval_s``: how often ``look`` is called. Without ``tell`` it listens, and writes nothing."""
        self._client = client
        self._interval_s = interval_s
        self._tells = tell
        self._life = secrets.token_hex(8)
        self._has_told = False
        self._share = bind(client, "tell")
        self._host = host
        self._clock = clock
        self._others: dict[str, _Other] = {}
        self._arrived: dict[str, deque[tuple[float, int]]] = {name: deque() for name in QUEUES}
        self._beat = int(time.time() * 1000)

    def look(self, own: list[Instance], now: float, figures: Figures | None = None) -> Seen:
        """Tell the others of our instances and figures, and look at everything. Raises BrokerUnavailable."""
        with typed_errors():
            told, redis_now, rival = self._tell(own, now, figures)
            remote, live, theirs = self._hear(told, redis_now, now)
            names = [str(instance.key) for instance in (*own, *remote)]
            depth = look_at_queues(self._client, names)
            claimed: Mapping[Any, Any] = self._client.hgetall(keys.CLAIMED)
            beating = frozenset(beats.fresh(self._client, names))
        queues = self._queues(depth, _by_queue(claimed))
        # Of a silent host, only what still beats is there.
        there = (one for one in remote if one.key.host in live or str(one.key) in beating)
        marked = tuple(with_busy(one, depth.inflight, beating) for one in there)
        return Seen(queues, depth.inflight, beating, marked, live, depth.dead_letters, theirs, rival)

    def _tell(
        self, own: list[Instance], now: float, figures: Figures | None
    ) -> tuple[dict[bytes, bytes], float, str]:
        """Tell the others; return what all tell, Redis's time, and who else has our name."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hgetall(HOSTS) if not self._tells else pipe.hget(HOSTS, self._host)
            (seconds, microseconds), found = pipe.execute()
        redis_now = seconds + microseconds / 1e6
        if not self._tells:
            return found, redis_now, ""
        life = _life(found)
        rival = life if self._has_told and life != self._life else ""
        self._beat += 1
        body = {
            "life": self._life,
            "beat": self._beat,
            "at": redis_now,
            "interval_s": self._interval_s,
            "figures": asdict(figures) if figures else None,
            "instances": [_told(instance, now) for instance in own],
        }
        flat: list[bytes] = self._share(keys=[HOSTS], args=[self._host, orjson.dumps(body)])
        self._has_told = True
        return dict(zip(flat[::2], flat[1::2], strict=True)), redis_now, rival

    def _hear(
        self, told: Mapping[bytes, bytes], redis_now: float, now: float
    ) -> tuple[tuple[Instance, ...], frozenset[str], dict[str, Figures]]:
        instances: list[Instance] = []
        live = {self._host}
        figures: dict[str, Figures] = {}
        for name, text in told.items():
            host = name.decode(errors="replace")
            if host == self._host:
                continue
            try:
                body = orjson.loads(text)
                theirs = [_heard(host, one, now) for one in body["instances"]]
                measured = _figures(body.get("figures"))
                beat = body["beat"]
                age_s = max(0.0, redis_now - float(body.get("at", redis_now)))
                limit_s = max(SILENT_S, SILENT_LOOKS * float(body.get("interval_s", 0.0)))
            except (ValueError, KeyError, TypeError) as exc:
                log.warning("host_unreadable", host=host, reason=f"{type(exc).__name__}: {exc}")
                continue
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

    def _queues(self, depth: Depth, claimed: Mapping[str, int]) -> dict[str, QueueState]:
        queues: dict[str, QueueState] = {}
        for name in QUEUES:
            waiting, done = sum(depth.waiting[name].values()), claimed.get(name, 0)
            queues[name] = QueueState(waiting=waiting, done=done, oldest_s=self._oldest(name, waiting, done))
        # Whose of the queues it is what is in flight, nobody knows; only the sum is asked for.
        queues["default"] = QueueState(
            waiting=queues["default"].waiting,
            in_flight=depth.total_inflight,
            done=queues["default"].done - depth.total_inflight,
            oldest_s=queues["default"].oldest_s,
        )
        return queues

    def _oldest(self, queue: str, waiting: int, claimed: int) -> float:
        """Return since when the first task after those that were claimed has been there."""
        arrived, now = self._arrived[queue], self._clock()
        while arrived and arrived[0][1] <= claimed:
            arrived.popleft()
        if not waiting:
            arrived.clear()
            return 0.0
        if not arrived or arrived[-1][1] < waiting + claimed:
            arrived.append((now, waiting + claimed))
        return now - arrived[0][0]


def _by_queue(counts: Mapping[bytes, bytes]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, count in counts.items():
        queue = keys.split_list_key(name.decode(errors="replace"))[0]
        totals[queue] = totals.get(queue, 0) + int(count)
    return totals


def with_busy(instance: Instance, in_flight: Mapping[str, int], beating: frozenset[str]) -> Instance:
    """Return an instance with what Redis knows of it: it holds tasks, or it beats and holds none."""
    name = str(instance.key)
    if instance.state != "active":
        return instance
    return replace(instance, busy=True if in_flight.get(name) else (False if name in beating else None))


def _life(text: bytes | None) -> str:
    """Return which life of a watcher has written an entry; of another version's it is not known."""
    try:
        return str(orjson.loads(text or b"{}").get("life", ""))
    except (ValueError, AttributeError):
        return ""


def _figures(told: Mapping[str, Any] | None) -> Figures | None:
    """Return what another watcher has measured; None from one that tells nothing of it."""
    if told is None:
        return None
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
        "out": instance.out,
        "log_only": instance.log_only,
    }


def _heard(host: str, one: Mapping[str, object], now: float) -> Instance:
    return Instance(
        key=Key(int(str(one["number"])), host),
        state=one["state"],  # type: ignore[arg-type]  # a watcher wrote it
        since=now - float(str(one["age_s"])),
        enabled=bool(one["enabled"]),
        masked=bool(one["masked"]),
        hold=one["hold"],  # type: ignore[arg-type]
        out=str(one["out"]),
        log_only=bool(one.get("log_only")),
    )
