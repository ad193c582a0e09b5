# SPDX-License-Identifier: Apache-2.0
"""Probes the fleet: reads Redis, and at the same time this host's units, disk and GPUs.

Facts that the user may not read are left out, as are those of a hanging device.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson
import redis

from gpuinfer import __version__
from gpuinfer.broker import durability
from gpuinfer.doctor import broker, fleet, system, units
from gpuinfer.doctor.check import Check, run_all, run_one
from gpuinfer.doctor.host import Finding, Host
from gpuinfer.doctor.redis_place import place_of
from gpuinfer.errors import UnusableRedis
from gpuinfer.gpus import DRIVER, list_gpus
from gpuinfer.queue import heartbeats, keys
from gpuinfer.queue.connection import connect, user_of
from gpuinfer.queue.depth import Depth, parse
from gpuinfer.queue.fleet import HOSTS, silent_after
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import Loaded, Settings
from gpuinfer.view import access, curves
from gpuinfer.view.facts import Facts

#: Maximum seconds to wait for this host's units, disk and GPUs after Redis has answered.
LOCAL_S = 1.0
#: The watchers' last decisions, of all hosts (see ``watcher.notes``).
_DECISIONS = "gpuinfer:watcher:decisions"
#: The doctor's quick checks: of Redis and the fleet, and of this host.
OF_REDIS: tuple[Check, ...] = (
    Check("redis.memory", broker.usage),
    Check("redis.file", broker.file),
    Check("work.dead", fleet.dead_letters),
    Check("work.orphans", fleet.orphans),
    Check("work.workers", fleet.workers),
    Check("work.served", fleet.waiting),
    Check("work.paused", fleet.paused),
    Check("work.foreign", fleet.foreign),
)
#: Checks that need Redis's administrator.
OF_ADMIN: tuple[Check, ...] = (Check("redis.durability", broker.durable),)
OF_HOST: tuple[Check, ...] = (
    Check("units.services", units.services, LOCAL_S),
    Check("units.workers", units.workers, LOCAL_S),
    Check("disk.data", system.data, LOCAL_S),
)


class Gatherer:
    """Probes repeatedly over one connection. Use it as a context manager."""

    def __init__(self, loaded: Loaded, *, since_s: float = 3600.0) -> None:
        """``since_s``: the span of the curves."""
        self._loaded = loaded
        self._settings = loaded.settings
        self._since_s = since_s
        self._client = connect(self._settings.broker, retries=0)
        self._host = Host(loaded, client=self._client)
        self._may_ask = user_of(self._settings.broker) in ("admin", "default")

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def look(self) -> Facts:
        """Probe once. If Redis does not answer, that is a finding, not an exception."""
        local = _Local(self._host)
        try:
            seen = self._ask()
            checks = (*OF_ADMIN, *OF_REDIS) if self._may_ask else OF_REDIS
            findings = [finding for check in checks for finding in run_one(check, self._host)]
        except (redis.RedisError, OSError, UnusableRedis):
            seen = {"now": time.time(), "reachable": False}
            findings = [*run_one(Check("redis.reach", broker.reach), Host(self._loaded))]
        findings += local.findings()
        return Facts(
            host=socket.gethostname(),
            version=__version__,
            place=place_of(self._settings.broker).shown,
            findings=[one for one in findings if one.status in ("error", "warning")],
            gpus=local.gpus(needed=not self._watched(seen)),
            access=access.who(self._settings, local.address()),
            since_s=self._since_s,
            **seen,
        )

    def _ask(self) -> dict[str, Any]:
        """Ask Redis in two round trips."""
        workers = [name.decode() for name in self._client.zrange(keys.WORKERS, 0, -1)]  # type: ignore[union-attr]
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for worker in workers:
                pipe.get(keys.heartbeat(worker))
            for worker in workers:
                pipe.hlen(keys.inflight(worker))
            bind(self._client, "depth")(args=[0], client=pipe)
            pipe.hlen(keys.DEAD)
            pipe.hgetall(HOSTS)
            pipe.hgetall(keys.ENDED)
            pipe.info("everything")
            pipe.lrange(_DECISIONS, 0, 0)
            answers = pipe.execute(raise_on_error=False)
        count = len(workers)
        moment, texts, held = answers[0], answers[1 : count + 1], answers[count + 1 : 2 * count + 1]
        counted, dead, hosts, ended, info, decisions = answers[2 * count + 1 :]
        if isinstance(counted, Exception):
            raise counted
        beats, now = heartbeats.parse(workers, [moment, *texts])
        inflight = {name: fields // 2 for name, fields in zip(workers, held, strict=True) if fields > 1}
        lines, why = curves.read(self._client, self._since_s)
        return {
            "now": now,
            "depth": Depth(**parse(counted)._asdict(), inflight=inflight, dead_letters=dead),
            "beats": beats,
            "told": _told(_unless_refused(hosts, {})),
            "ended": _counters(_unless_refused(ended, None)),
            "info": _unless_refused(info, {}),
            "decision": _decision(_unless_refused(decisions, [])),
            # Other users may not run it, and Redis records each refusal in its ACL log.
            "durability": durability.running(self._client) if self._may_ask else None,
            "curves": lines,
            "no_curves": why,
        }

    def _watched(self, seen: Mapping[str, Any]) -> bool:
        """Whether this host's watcher reports its GPUs."""
        body = seen.get("told", {}).get(socket.gethostname())
        return bool(body and body.get("gpus") and seen["now"] - float(body["at"]) <= silent_after(body))


def _unless_refused(answer: Any, instead: Any) -> Any:
    return instead if isinstance(answer, Exception) else answer


def _told(hosts: Mapping[bytes, bytes]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for name, text in hosts.items():
        with suppress(ValueError):  # the watchers' logs say so
            body = orjson.loads(text)
            if isinstance(body, dict) and isinstance(body.get("instances"), list):
                found[name.decode(errors="replace")] = body
    return found


def _counters(found: Mapping[bytes, bytes] | None) -> dict[str, int] | None:
    if found is None:
        return None
    return {name.decode(errors="replace"): int(count) for name, count in found.items()}


def _decision(found: Sequence[bytes]) -> Mapping[str, Any] | None:
    with suppress(ValueError, IndexError):
        body = orjson.loads(found[0])
        return body if isinstance(body, dict) else None
    return None


class _Local:
    """Probes of this host, run while Redis answers. A thread that hangs in a driver is abandoned."""

    def __init__(self, host: Host) -> None:
        self._settings = host.settings
        self._until = time.monotonic() + LOCAL_S
        self._found: dict[str, Any] = {}
        self._threads: dict[str, threading.Thread] = {}
        booted = host.path("/run/systemd/system").is_dir()
        checks = OF_HOST if booted else OF_HOST[-1:]
        self._start("findings", lambda: [one for found in run_all(checks, host) for one in found])
        if booted:
            self._start("address", lambda: units.address(host))
        if self._settings.worker.device != "cpu" and DRIVER.exists():
            self._start("gpus", lambda: _readings(self._settings))

    def _start(self, name: str, work: Callable[[], Any]) -> None:
        def run() -> None:
            with suppress(Exception):  # what cannot be read is left out
                self._found[name] = work()

        self._threads[name] = threading.Thread(target=run, name=name, daemon=True)
        self._threads[name].start()

    def _get(self, name: str, instead: Any) -> Any:
        if name in self._threads:
            self._threads[name].join(max(0.0, self._until - time.monotonic()))
        return self._found.get(name, instead)

    def findings(self) -> list[Finding]:
        """Return the findings of this host's checks."""
        return list(self._get("findings", []))

    def gpus(self, *, needed: bool) -> Sequence[Mapping[str, Any]]:
        """Return this host's GPUs; wait for them only where no watcher reports them."""
        found: Sequence[Mapping[str, Any]] = self._get("gpus", []) if needed else []
        return found

    def address(self) -> tuple[str, int]:
        """Return where the API listens."""
        api = self._settings.api
        found: tuple[str, int] = self._get("address", (api.host, api.port))
        return found


def _readings(settings: Settings) -> Sequence[Mapping[str, Any]]:
    import pynvml

    from gpuinfer.gpu_readings import readings

    worker = settings.worker
    found = list_gpus(worker.gpus, per_gpu=worker.per_gpu, nvml=pynvml)
    gpus = {number: found.of_worker(number) for number in found.worker_numbers}
    return readings(pynvml, {number: gpu for number, gpu in gpus.items() if gpu is not None})
