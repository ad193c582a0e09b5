# SPDX-License-Identifier: Apache-2.0
"""Redis: is it reachable, does it take work, is it the version and the instance we think it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import redis
from redis.exceptions import RedisError

from gpuinfer.doctor.finding import Finding, Skipped, edit, error, ok
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_errors import diagnose
from gpuinfer.doctor.redis_place import Place, place_of
from gpuinfer.errors import FormatMismatch, UnusableRedis
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect

#: Does nothing, and is refused whenever a producer's script would be: OOM, MISCONF, READONLY. It names
#: no key, so that any login that may submit may run it.
_WOULD_WRITE = "#!lua\nreturn 1"
_OLDEST = (7, 0)
_EDIT = f"{edit('/etc/gpuinfer/gpuinfer.toml')}  # broker.url"


def reach(host: Host) -> Finding:
    """Redis answers this host's login, and takes new work."""
    broker = host.settings.broker
    where = place_of(broker)
    try:
        with connect(broker, retries=0) as client:
            client.ping()
            client.llen(keys.list_key("default", 0))
            _take_work(client)
    except UnusableRedis as exc:
        return error(exc.message, "gpuinfer redis migrate" if isinstance(exc, FormatMismatch) else _EDIT)
    except (RedisError, OSError) as exc:
        return diagnose(exc, where)
    as_user = f" as user {broker.username}" if broker.username else ""
    return ok(f"Redis at {where.shown} answers{as_user}, and takes new work")


def _take_work(client: redis.Redis) -> None:
    client.register_script(_WOULD_WRITE)()


@contextmanager
def asked(host: Host) -> Iterator[redis.Redis]:
    """Lend a connection. What goes wrong with it is the business of ``reach``: here it is a Skipped."""
    try:
        if host.client is not None:
            yield host.client
            return
        with connect(host.settings.broker, retries=0) as client:
            yield client
    except (RedisError, OSError, UnusableRedis) as exc:
        denied = "NOPERM" in str(exc) or "no permissions" in str(exc)
        raise Skipped(
            "this login may not ask" if denied else "Redis cannot be asked; see redis.reach"
        ) from None


def info(host: Host, section: str) -> Mapping[str, Any]:
    """Return a section of INFO. Raises Skipped."""
    with asked(host) as client:
        found: Mapping[str, Any] = client.info(section)
        return found


def version(host: Host) -> Finding:
    """Redis is new enough for our scripts."""
    found = info(host, "server")
    name = "Valkey" if "valkey_version" in found else "Redis"
    text = str(found.get("valkey_version") or found["redis_version"])
    if tuple(int(part) for part in str(found["redis_version"]).split(".")[:2]) < _OLDEST:
        return error(f"{name} {text} is too old: 7.0 or newer is needed", "apt install redis-server")
    return ok(f"{name} {text}")


def local_redis_pid(host: Host) -> int | None:
    """Return the process id of Redis where it runs on this very host, else None."""
    where: Place = place_of(host.settings.broker)
    if not where.local:
        return None
    pid = int(info(host, "server")["process_id"])
    with suppress(OSError):
        if "redis" in host.path(f"/proc/{pid}/comm").read_text(encoding="utf-8"):
            return pid
    return None
