# SPDX-License-Identifier: Apache-2.0
"""The models that the fleet knows: the workers that serve each, the waiting tasks, and the default model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson
import redis
import redis.asyncio

from gpuinfer.errors import UnknownModel
from gpuinfer.models.signature import Signature
from gpuinfer.plural import tasks_wait
from gpuinfer.queue import heartbeats, keys
from gpuinfer.queue.depth import Counted, Depth, Lane, is_paused, parse
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QUEUES


class Unserved(NamedTuple):
    """Waiting tasks that no live worker would claim."""

    tier: str
    #: Empty: the tasks name no model, and the fleet has no default model.
    model: str
    tasks: int
    #: True when a live worker serves the model, but not this queue.
    elsewhere: bool
    #: Why a live worker that should serve it does not.
    why: str = ""

    def __str__(self) -> str:
        what = f"{tasks_wait(self.tasks)} in {self.tier} for"
        if not self.model:
            return f"{what} the default model, and none is set"
        what = f"{what} model {self.model}"
        if self.elsewhere:
            return f"{what}, and no live worker of that model serves the queue {self.tier}"
        return f"{what}, which no live worker serves" + (f": {self.why}" if self.why else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """One model of the fleet at one moment."""

    name: str
    default: bool = False
    #: When a worker or host that can serve it was last seen, by Redis's clock; None: not in the catalogue.
    last_seen: float | None = None
    #: Live worker (``gpu0@host``) that serves it -> the queues of that worker.
    workers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    #: Live worker that should serve it but could not load it -> why.
    missing: Mapping[str, str] = field(default_factory=dict)
    #: Queue -> tasks waiting for it.
    waiting: Mapping[str, int] = field(default_factory=dict)
    #: Queues that are paused for it.
    paused: Sequence[str] = ()

    @property
    def serving(self) -> bool:
        """True when a live worker serves it."""
        return bool(self.workers)

    @property
    def queues(self) -> list[str]:
        """The queues in which live workers serve it, the most urgent first."""
        served = {tier for tiers in self.workers.values() for tier in tiers}
        return [tier for tier in QUEUES if tier in served]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        seen = None if self.last_seen is None else datetime.fromtimestamp(self.last_seen, UTC).isoformat()
        return {
            "name": self.name,
            "default": self.default,
            "serving": self.serving,
            "queues": self.queues,
            "workers": len(self.workers),
            "missing": dict(self.missing),
            "waiting": {tier: self.waiting.get(tier, 0) for tier in QUEUES},
            "paused": list(self.paused),
            "last_seen": seen,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """All models of the fleet at one moment: those in the catalogue, and those that tasks wait for."""

    #: Empty if none is set.
    default_model: str
    models: Mapping[str, ModelState]
    #: Waiting tasks that no live worker would claim, the most urgent first.
    unserved: Sequence[Unserved]

    @property
    def known(self) -> list[str]:
        """The names in the catalogue."""
        return [name for name, model in self.models.items() if model.last_seen is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "default_model": self.default_model or None,
            "models": [model.to_dict() for model in self.models.values()],
            "unserved": [
                {"queue": it.tier, "model": it.model or None, "waiting": it.tasks, "message": str(it)}
                for it in self.unserved
            ],
        }


def fleet(counted: Counted | Depth, beats: Mapping[str, Mapping[str, Any]]) -> Fleet:
    """Combine what was counted with the heartbeats of live workers."""
    names = {*counted.catalogue, *(lane.model for lane in counted.lanes), counted.default_model} - {""}
    names |= {name for beat in beats.values() for name in _missing(beat)}
    models = {name: _model(name, counted, beats) for name in sorted(names)}
    return Fleet(
        default_model=counted.default_model,
        models=models,
        unserved=tuple(_unserved(counted, models)),
    )


def _missing(beat: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the models that a worker should serve but could not load, and why."""
    found = beat.get("missing")
    return found if isinstance(found, dict) else {}


def _model(name: str, counted: Counted | Depth, beats: Mapping[str, Mapping[str, Any]]) -> ModelState:
    return ModelState(
        name=name,
        default=name == counted.default_model,
        last_seen=counted.catalogue.get(name),
        workers={
            worker: tuple(beat.get("queues", ()))
            for worker, beat in sorted(beats.items())
            if name in beat.get("models", ())
        },
        missing={
            worker: str(_missing(beat)[name])
            for worker, beat in sorted(beats.items())
            if name in _missing(beat)
        },
        waiting={
            lane.tier: sum(levels.values()) for lane, levels in counted.lanes.items() if lane.model == name
        },
        paused=tuple(tier for tier in QUEUES if is_paused(Lane(tier, name), counted.paused)),
    )


def _unserved(counted: Counted | Depth, models: Mapping[str, ModelState]) -> Iterator[Unserved]:
    tiers: tuple[str, ...] = QUEUES
    for lane in sorted(counted.lanes, key=lambda lane: (tiers.index(lane.tier), lane.model)):
        model, tasks = models.get(lane.model), sum(counted.lanes[lane].values())
        if tasks and (model is None or lane.tier not in model.queues):
            why = next(iter(model.missing.values()), "") if model is not None else ""
            yield Unserved(lane.tier, lane.model, tasks, model is not None and model.serving, why)


# -- reading ------------------------------------------------------------------------------


def read(client: redis.Redis) -> Fleet:
    """Read the fleet's models in two round trips. Raises redis-py's errors."""
    with client.pipeline(transaction=False) as pipe:
        bind(client, "depth")(args=[0], client=pipe)
        pipe.zrange(keys.WORKERS, 0, -1)
        answer, workers = pipe.execute()
    beats, now = heartbeats.read(client, _texts(workers))
    return fleet(parse(answer), heartbeats.alive(beats, now))


async def aread(client: redis.asyncio.Redis) -> Fleet:
    """Do what ``read`` does, with an asyncio client."""
    async with client.pipeline(transaction=False) as pipe:
        await bind(client, "depth")(args=[0], client=pipe)
        pipe.zrange(keys.WORKERS, 0, -1)
        answer, workers = await pipe.execute()
    names = _texts(workers)
    async with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for worker in names:
            pipe.get(keys.heartbeat(worker))
        beats, now = heartbeats.parse(names, await pipe.execute())
    return fleet(parse(answer), heartbeats.alive(beats, now))


def _texts(values: Iterable[bytes]) -> list[str]:
    return [value.decode() for value in values]


def default_model(client: redis.Redis) -> str | None:
    """Return the fleet's default model; None if none is set. Raises redis-py's errors."""
    found: bytes | None = client.get(keys.DEFAULT_MODEL)  # type: ignore[assignment]  # not decoded
    return found.decode() if found else None


def names(client: redis.Redis) -> list[str]:
    """Return the names of the models in the catalogue, sorted. Raises redis-py's errors."""
    return sorted(_texts(client.zrange(keys.CATALOGUE, 0, -1)))  # type: ignore[arg-type]  # not decoded


def unknown(client: redis.Redis, models: Iterable[str]) -> tuple[str, ...]:
    """Return those of these models that are not in the catalogue; none while the catalogue is empty.

    Raises redis-py's errors.
    """
    asked = tuple(models)
    with client.pipeline(transaction=False) as pipe:
        pipe.zcard(keys.CATALOGUE)
        for model in asked:
            pipe.zscore(keys.CATALOGUE, model)
        size, *seen = pipe.execute()
    return tuple(model for model, at in zip(asked, seen, strict=True) if size and at is None)


# -- changing -----------------------------------------------------------------------------


def set_default(client: redis.Redis, model: str, *, force: bool = False) -> str | None:
    """Make ``model`` the fleet's default; return the one before. Raises redis-py's errors.

    Raises UnknownModel for a name that is not in the catalogue, unless the catalogue is empty or ``force``.
    """
    known = names(client)
    if known and model not in known and not force:
        raise UnknownModel(
            f"the fleet knows no model {model!r}; known: {', '.join(known)}; --force sets it anyway",
            "model",
        )
    before: bytes | None = client.set(keys.DEFAULT_MODEL, model, get=True)  # type: ignore[assignment]
    return before.decode() if before else None


def servers(client: redis.Redis, model: str) -> list[str]:
    """Return the live workers that serve a model. Raises redis-py's errors."""
    live = heartbeats.fresh(client)
    return sorted(worker for worker, beat in live.items() if model in beat.get("models", ()))


def described_as(who: str, signatures: Mapping[str, Signature]) -> list[str | bytes]:
    """Return the arguments of the script ``describe``: ``who`` reports, then model and signature in pairs."""
    return [who, *(part for name, one in signatures.items() for part in (name, orjson.dumps(one.to_json())))]


def forget(client: redis.Redis, model: str) -> bool:
    """Drop a model from the catalogue; return whether it was there. Raises redis-py's errors.

    The next heartbeat of a worker that serves it adds it again.
    """
    client.hdel(keys.SIGNATURES, model)
    return bool(client.zrem(keys.CATALOGUE, model))


__all__ = [
    "Fleet",
    "ModelState",
    "Unserved",
    "aread",
    "default_model",
    "described_as",
    "fleet",
    "forget",
    "read",
    "servers",
    "set_default",
]
