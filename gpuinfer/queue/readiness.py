# SPDX-License-Identifier: Apache-2.0
"""Which workers serve now, and which may be started: from heartbeats, and from live watchers' reports.

A worker counts while its heartbeat is at most ``heartbeats.FRESH_S`` old and it does not drain. An instance
that does not serve counts if its host's watcher is alive and it is starting or may be started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import redis.asyncio

from gpuinfer.queue import heartbeats, keys
from gpuinfer.queue.drained import DRAINED, FINISHING
from gpuinfer.queue.fleet import HOSTS, Serves, said, silent_after, told


@dataclass(frozen=True, slots=True)
class Capacity:
    """The workers that serve, or may be started, at one moment."""

    #: Live worker (``gpu0@host``) -> what it serves.
    live: Mapping[str, Serves] = field(default_factory=dict)
    #: Instance that is starting, or that a live watcher may start -> what it would serve.
    startable: Mapping[str, Serves] = field(default_factory=dict)
    #: Instance that is not started -> why.
    excluded: Mapping[str, str] = field(default_factory=dict)
    #: The models of the catalogue, sorted.
    catalogue: tuple[str, ...] = ()
    #: Model -> the versions of it that live workers report, sorted.
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, model: str) -> Capacity:
        """Return only the workers that serve, or would serve, one model."""
        live, startable = _of(self.live, model), _of(self.startable, model)
        return Capacity(live, startable, self.excluded, self.catalogue, self.versions)

    def knows(self, model: str) -> bool:
        """Tell whether a model is in the catalogue, or served by a live worker."""
        return model in self.catalogue or any(model in one.models for one in self.live.values())


def _of(found: Mapping[str, Serves], model: str) -> dict[str, Serves]:
    return {name: one for name, one in found.items() if not one.models or model in one.models}


def parse(
    beats: Mapping[str, dict[str, Any]],
    hosts: Mapping[str, bytes],
    now: float,
    catalogue: Sequence[str] = (),
) -> Capacity:
    """Read heartbeats and watchers' reports. ``now``: Redis's time, in seconds since the epoch.

    Malformed reports are ignored; the watchers log them.
    """
    live: dict[str, Serves] = {}
    missing: dict[str, set[str]] = {}
    versions: dict[str, set[str]] = {}
    drained: set[str] = set()
    for worker, body in heartbeats.alive(beats, now).items():
        serves = said(body)
        if body.get("state") in (FINISHING, DRAINED):
            drained.add(worker)
        elif serves is not None:
            live[worker] = serves
            told_versions = body.get("versions")
            for model, version in (told_versions if isinstance(told_versions, dict) else {}).items():
                if isinstance(version, str) and version:
                    versions.setdefault(model, set()).add(version)
        absent = body.get("missing")
        missing.setdefault(worker.partition("@")[2], set()).update(absent if isinstance(absent, dict) else ())
    startable: dict[str, Serves] = {}
    excluded: dict[str, str] = {}
    for host, text in hosts.items():
        for name, (serves, reason) in _instances(host, text, now).items():
            if name in live:
                continue
            left = tuple(model for model in serves.models if model not in missing.get(host, ()))
            if reason or name in drained:
                excluded[name] = "it is drained" if name in drained else reason
            elif left or not serves.models:
                startable[name] = serves._replace(models=left)
            else:
                excluded[name] = "its models cannot be loaded on its host"
    found = {model: tuple(sorted(ones)) for model, ones in versions.items()}
    return Capacity(live, startable, excluded, tuple(sorted(catalogue)), found)


def _instances(host: str, text: bytes, now: float) -> dict[str, tuple[Serves, str]]:
    """Return a host's instances: what each would serve, and why it is not started. Empty if malformed."""
    try:
        body = orjson.loads(text)
        silent = now - body["at"] > silent_after(body)
        return {
            f"gpu{int(one['number'])}@{host}": (
                told(one),
                "its host's watcher is silent" if silent else _why_not(one),
            )
            for one in body["instances"]
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _why_not(one: Mapping[str, Any]) -> str:
    """Return why an instance will not serve; empty if it is starting or may be started."""
    state = one.get("state")
    if one.get("excluded"):
        return str(one["excluded"])
    if state == "activating":
        return ""
    if one.get("masked"):
        return "masked"
    if state == "active":
        return "it runs, but sends no heartbeat"
    return "its host's watcher only logs" if one.get("log_only") else ""


async def aread(client: redis.asyncio.Redis) -> Capacity:
    """Read the capacity in two round trips. Raises redis-py's errors, and UnusableRedis."""
    async with client.pipeline(transaction=False) as pipe:
        pipe.zrange(keys.WORKERS, 0, -1)
        pipe.zrange(keys.CATALOGUE, 0, -1)
        pipe.hgetall(HOSTS)
        workers, catalogue, hosts = await pipe.execute()
    names = [name.decode() for name in workers]
    async with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for name in names:
            pipe.get(keys.heartbeat(name))
        beats, now = heartbeats.parse(names, await pipe.execute())
    told_by = {name.decode(errors="replace"): text for name, text in hosts.items()}
    return parse(beats, told_by, now, [name.decode() for name in catalogue])
