# SPDX-License-Identifier: Apache-2.0
"""Reads the data for all metrics from Redis at one moment; no payloads, no results.

Totals are kept in Redis by ``queue.tally`` and the scripts, queues are counted here, and workers and watchers
report about themselves.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import redis

from gpuinfer.queue import depth, heartbeats, keys
from gpuinfer.queue.connection import DURABILITY
from gpuinfer.queue.depth import Depth, Lane
from gpuinfer.queue.fleet import HOSTS, silent_after
from gpuinfer.queue.scripts import bind
from gpuinfer.redis_url import parse
from gpuinfer.settings import BrokerSettings

#: Maximum number of lists whose memory is measured.
MOST_WEIGHED = 500
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Ends(NamedTuple):
    """The labels under which ended tasks are counted."""

    outcome: str
    lane: Lane


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The fleet at one moment."""

    #: Redis's time.
    now: float
    depth: Depth
    #: Worker -> its last heartbeat, of any age.
    beats: Mapping[str, Mapping[str, Any]]
    #: Ended tasks since this Redis was empty, and the bytes of their results.
    ended: Mapping[Ends, int] = field(default_factory=dict)
    result_bytes: Mapping[Lane, int] = field(default_factory=dict)
    #: (kind, name, name) -> total, see ``queue.tally``.
    counts: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    #: Lane -> bytes of its lists in Redis; queue -> bytes of large bodies, stored outside the lists.
    list_bytes: Mapping[Lane, int] = field(default_factory=dict)
    body_bytes: Mapping[str, int] = field(default_factory=dict)
    dead_bytes: int = 0
    #: Host -> last report of its watcher (itself, queues, GPUs), and the hosts whose watchers are alive.
    hosts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    live_hosts: frozenset[str] = frozenset()
    #: Redis's INFO.
    redis: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alive(self) -> dict[str, Mapping[str, Any]]:
        """The heartbeats of live workers."""
        return {
            worker: body
            for worker, body in self.beats.items()
            if self.now - body.get("at", 0.0) <= heartbeats.FRESH_S
        }

    def total(self, kind: str) -> int:
        """Return the total of one kind."""
        return sum(count for (found, _, _), count in self.counts.items() if found == kind)

    def oldest(self) -> dict[Lane, float]:
        """Return how many seconds the oldest task of each lane has waited, as live watchers report it."""
        found: dict[Lane, float] = {}
        for host in sorted(self.live_hosts):
            for name, told in self.hosts[host].get("queues", {}).items():
                tier, _, model = name.partition(".")
                lane, seconds = Lane(tier, model), float(told.get("oldest_s", 0.0))
                found[lane] = max(found.get(lane, 0.0), seconds)
        return found


def gather(client: redis.Redis, *, weigh: bool = True) -> Snapshot:
    """Read everything in three round trips; without ``weigh``, except the bytes of lists.

    Raises redis-py's errors.
    """
    found: list[bytes] = client.zrange(keys.WORKERS, 0, -1)  # type: ignore[assignment]  # not decoded
    workers = sorted(name.decode(errors="replace") for name in found)
    with client.pipeline(transaction=False) as pipe:
        bind(client, "depth")(args=[0], client=pipe)
        for worker in workers:
            pipe.hlen(keys.inflight(worker))
        pipe.hlen(keys.DEAD)
        pipe.time()
        for worker in workers:
            pipe.get(keys.heartbeat(worker))
        for name in (keys.ENDED, keys.COUNTS, keys.BODY_BYTES, HOSTS):
            pipe.hgetall(name)
        pipe.get(keys.DEAD_BYTES)
        pipe.info()
        answers = pipe.execute()
    depths, answers = answers[: len(workers) + 2], answers[len(workers) + 2 :]
    beats, now = heartbeats.parse(workers, answers[: len(workers) + 1])
    ended, counts, bodies, told, dead_bytes, info = answers[len(workers) + 1 :]
    queues = depth.of(workers, depths)
    hosts = _parsed(told)
    ends, result_bytes = _ended(ended)
    return Snapshot(
        now=now,
        depth=queues,
        beats=beats,
        ended=ends,
        result_bytes=result_bytes,
        counts=dict(_counts(counts)),
        list_bytes=_weigh(client, depths[0][2], queues.default_model) if weigh else {},
        body_bytes={tier.decode(): max(0, int(size)) for tier, size in bodies.items()},
        dead_bytes=int(dead_bytes or 0),
        hosts=hosts,
        live_hosts=_live(hosts, now),
        redis=info,
    )


def _ended(found: Mapping[bytes, bytes]) -> tuple[dict[Ends, int], dict[Lane, int]]:
    ends: dict[Ends, int] = {}
    sizes: dict[Lane, int] = {}
    for name, count in found.items():
        outcome, _, place = name.decode(errors="replace").partition(" ")
        tier, _, model = place.partition(" ")
        if outcome == "bytes":
            sizes[Lane(tier, model)] = int(count)
        else:
            ends[Ends(outcome, Lane(tier, model))] = int(count)
    return ends, sizes


def _counts(found: Mapping[bytes, bytes]) -> Iterator[tuple[tuple[str, str, str], int]]:
    for name, count in found.items():
        kind, _, rest = name.decode(errors="replace").partition(" ")
        first, _, second = rest.partition(" ")
        yield (kind, first, second), int(count)


def _weigh(client: redis.Redis, waiting: Sequence[bytes | int], default: str) -> dict[Lane, int]:
    """Return the bytes of each lane's lists, as Redis estimates them from some entries.

    ``waiting``: list, tasks, list, tasks, …; if there are too many lists, only the longest are measured.
    """
    lengths = {bytes(name): int(count) for name, count in zip(waiting[::2], waiting[1::2], strict=True)}
    names = sorted(lengths, key=lambda name: -lengths[name])[:MOST_WEIGHED]
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.memory_usage(name)
        answers = pipe.execute(raise_on_error=False)
    sizes: dict[Lane, int] = {}
    for name, size in zip(names, answers, strict=True):
        if keys.ours(key := name.decode(errors="backslashreplace")) and isinstance(size, int):
            place = keys.place_of(key)
            lane = Lane(place.tier, place.model or default)
            sizes[lane] = sizes.get(lane, 0) + size
    return sizes


def _parsed(found: Mapping[bytes, bytes]) -> dict[str, Mapping[str, Any]]:
    """Return the reports of the hosts' watchers without unreadable ones (the watchers log those)."""
    told: dict[str, Mapping[str, Any]] = {}
    for name, text in found.items():
        try:
            body = orjson.loads(text)
        except orjson.JSONDecodeError:
            continue
        if isinstance(body, dict):
            told[name.decode(errors="replace")] = body
    return told


def _live(hosts: Mapping[str, Mapping[str, Any]], now: float) -> frozenset[str]:
    return frozenset(
        host
        for host, body in hosts.items()
        if isinstance(body.get("at"), int | float) and now - body["at"] <= silent_after(body)
    )


def is_redis_host(broker: BrokerSettings) -> bool:
    """Tell whether Redis runs on this host, by its address."""
    place = parse(broker.url)
    if place.scheme == "unix":
        return True
    return place.host in (*_LOOPBACK, socket.gethostname(), socket.getfqdn())


def durability(broker: BrokerSettings) -> str:
    """Return the appendfsync mode that a local Redis recorded at its start; "" if unknown."""
    place = parse(broker.url)
    if place.scheme != "unix":
        return ""
    try:
        return Path(place.path).with_name(DURABILITY).read_text(encoding="ascii")[:20].strip()
    except (OSError, UnicodeDecodeError):
        return ""
