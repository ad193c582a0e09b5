# SPDX-License-Identifier: Apache-2.0
"""The queues' depths: how many tasks wait, are in flight, or are dead letters. No payload is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import redis.asyncio

from gpuinfer.queue import keys
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QUEUES


class Lane(NamedTuple):
    """The queue of one model in one tier."""

    tier: str
    model: str

    @property
    def name(self) -> str:
        """Return its name, ``realtime.resnet``; without a model, ``realtime``."""
        return f"{self.tier}.{self.model}" if self.model else self.tier


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """The queues at one moment."""

    #: Lane -> priority -> waiting tasks; empty lanes and priorities are left out.
    lanes: Mapping[Lane, Mapping[int, int]]
    #: Lane -> tasks ever claimed from it, less those that were put back.
    claimed: Mapping[Lane, int]
    #: Worker (``gpu0@host``) -> tasks it has claimed and not settled.
    inflight: Mapping[str, int]
    dead_letters: int
    #: Lane -> tasks that wait for their ETA; ``due``: how many of them are due within ``ahead_s``.
    later: Mapping[Lane, int] = field(default_factory=dict)
    due: Mapping[Lane, int] = field(default_factory=dict)
    #: Queues from which nothing is claimed: a tier, or ``tier.model``.
    paused: tuple[str, ...] = ()
    #: Key with one of our names but another type -> that type.
    foreign: Mapping[str, str] = field(default_factory=dict)
    #: The model of requests that name none; empty if none is set.
    default_model: str = ""
    #: Model that the fleet knows -> when a worker or host that can serve it was last seen (Redis's clock).
    catalogue: Mapping[str, float] = field(default_factory=dict)

    @property
    def waiting(self) -> Mapping[str, Mapping[int, int]]:
        """Tier -> priority -> waiting tasks, over all models; empty priorities are left out."""
        tiers: dict[str, dict[int, int]] = {tier: {} for tier in QUEUES}
        for lane, levels in self.lanes.items():
            for priority, count in levels.items():
                tiers[lane.tier][priority] = tiers[lane.tier].get(priority, 0) + count
        return tiers

    @property
    def total_waiting(self) -> int:
        """The number of waiting tasks in all queues."""
        return sum(sum(levels.values()) for levels in self.lanes.values())

    @property
    def total_later(self) -> int:
        """The number of tasks that wait for their ETA."""
        return sum(self.later.values())

    def is_paused(self, lane: Lane) -> bool:
        """Tell whether a lane is paused."""
        return is_paused(lane, self.paused)

    @property
    def total_inflight(self) -> int:
        """The number of tasks that all workers hold."""
        return sum(self.inflight.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; priorities become text, as JSON keys must be."""
        queues: dict[str, Any] = {}
        for tier, levels in self.waiting.items():
            models = {lane.model: found for lane, found in sorted(self.lanes.items()) if lane.tier == tier}
            queues[tier] = {
                "waiting": sum(levels.values()),
                "by_priority": _by_priority(levels),
                "by_model": {model: _by_priority(found) for model, found in models.items()},
                "later": {lane.model: count for lane, count in self.later.items() if lane.tier == tier},
            }
        return {
            "queues": queues,
            "waiting": self.total_waiting,
            "later": self.total_later,
            "paused": list(self.paused),
            "foreign_keys": dict(self.foreign),
            "in_flight": dict(self.inflight),
            "dead_letters": self.dead_letters,
            "default_model": self.default_model or None,
        }


def _by_priority(levels: Mapping[int, int]) -> dict[str, int]:
    return {str(priority): levels[priority] for priority in sorted(levels, reverse=True)}


def known_workers(client: redis.Redis) -> dict[str, float]:
    """Return known worker -> when it was last seen, by Redis's clock."""
    found: list[Any] = client.zrange(keys.WORKERS, 0, -1, withscores=True)
    return {name.decode(): float(seen) for name, seen in found}


class Counted(NamedTuple):
    """What the script ``depth`` counted; the fields are those of ``Depth``."""

    lanes: Mapping[Lane, Mapping[int, int]]
    claimed: Mapping[Lane, int]
    default_model: str
    catalogue: Mapping[str, float]
    later: Mapping[Lane, int]
    due: Mapping[Lane, int]
    paused: tuple[str, ...]
    foreign: Mapping[str, str]


def is_paused(lane: Lane, paused: Sequence[str]) -> bool:
    """Tell whether a lane is among the paused queues, by its tier or its own name."""
    return lane.tier in paused or lane.name in paused


def parse(answer: Any) -> Counted:
    """Read the answer of the script ``depth``. A list whose name is not ours is counted as foreign."""
    default, catalogue, waiting, claimed, sets, paused, foreign = answer
    default_model = default.decode()
    others = {
        key.decode(errors="backslashreplace"): kind.decode()
        for key, kind in zip(foreign[::2], foreign[1::2], strict=True)
    }
    lanes: dict[Lane, dict[int, int]] = {}
    for name, count in zip(waiting[::2], waiting[1::2], strict=True):
        if not keys.ours(key := name.decode(errors="backslashreplace")):
            others[key] = "list"
            continue
        lane, priority = _lane(key, default_model)
        levels = lanes.setdefault(lane, {})
        levels[priority] = levels.get(priority, 0) + int(count)
    totals: dict[Lane, int] = {}
    for name, count in zip(claimed[::2], claimed[1::2], strict=True):
        key, _, model = name.decode(errors="backslashreplace").partition(" ")
        if not keys.ours(key):
            continue
        lane, _ = _lane(key, model or default_model)
        totals[lane] = totals.get(lane, 0) + int(count)
    later: dict[Lane, int] = {}
    soon: dict[Lane, int] = {}
    for name, count, due in zip(sets[::3], sets[1::3], sets[2::3], strict=True):
        if not keys.ours(key := name.decode(errors="backslashreplace")):
            others[key] = "list"
            continue
        lane, _ = _lane(key, default_model)
        later[lane] = later.get(lane, 0) + int(count)
        soon[lane] = soon.get(lane, 0) + int(due)
    seen = {name.decode(): float(at) for name, at in zip(catalogue[::2], catalogue[1::2], strict=True)}
    queues = tuple(paused.decode(errors="replace").split())
    return Counted(lanes, totals, default_model, seen, later, soon, queues, others)


def read(client: redis.Redis, workers: Sequence[str] = (), *, ahead_s: float = 0.0) -> Depth:
    """Count in two round trips. ``workers``: counted in addition to the known ones.

    ``ahead_s``: tasks whose ETA comes within this many seconds count as ``due``.
    """
    names = sorted({*workers, *known_workers(client)})
    with client.pipeline(transaction=False) as pipe:
        bind(client, "depth")(args=[ahead_s], client=pipe)
        for name in names:
            pipe.hlen(keys.inflight(name))
        pipe.hlen(keys.DEAD)
        return of(names, pipe.execute())


async def aread(client: redis.asyncio.Redis) -> Depth:
    """Count as ``read`` does, with an asyncio client."""
    found: list[bytes] = await client.zrange(keys.WORKERS, 0, -1)  # type: ignore[assignment]  # not decoded
    names = sorted(name.decode() for name in found)
    async with client.pipeline(transaction=False) as pipe:
        await bind(client, "depth")(args=[0], client=pipe)
        for name in names:
            pipe.hlen(keys.inflight(name))
        pipe.hlen(keys.DEAD)
        return of(names, await pipe.execute())


def of(names: Sequence[str], answers: Sequence[Any]) -> Depth:
    """Make it from the answers to the script, to an HLEN of each in-flight hash, and to HLEN of ``DEAD``."""
    answer, *counts = answers
    # Two fields per task, and perhaps one more: the record of what runs.
    held = {name: fields // 2 for name, fields in zip(names, counts[:-1], strict=True)}
    return Depth(
        **parse(answer)._asdict(),
        inflight={name: count for name, count in held.items() if count},
        dead_letters=counts[-1],
    )


def _lane(key: str, default_model: str) -> tuple[Lane, int]:
    place = keys.place_of(key)
    return Lane(place.tier, place.model or default_model), place.priority
