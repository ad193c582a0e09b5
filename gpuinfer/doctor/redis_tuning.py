# SPDX-License-Identifier: Apache-2.0
"""Redis's memory and its file: as an appliance needs them. ``redis_config`` compares with its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpuinfer.doctor.broker import asked, info
from gpuinfer.doctor.disk import redis_folder
from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_place import Place, place_of
from gpuinfer.doctor.units import show

_MIB = 1024 * 1024
#: A rewrite of the AOF in a forked child copies what is written meanwhile; some room is for that.
_UNIT_FACTOR = 1.2
_FULL_SHARE = 0.85
_RESTART = "systemctl restart gpuinfer-redis"


def running(host: Host, *keys: str) -> dict[str, str]:
    """Return what CONFIG GET answers. Raises Skipped."""
    with asked(host) as client:
        return texts(client.config_get(*keys))


def texts(answer: Mapping[Any, Any]) -> dict[str, str]:
    """Return an answer of CONFIG GET, which a client gives as text or as bytes, as text."""
    pairs = ((key, value) for key, value in answer.items())
    return {_text(key): _text(value) for key, value in pairs}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def limits(host: Host) -> Findings:
    """Redis has a limit, evicts results alone, and keeps what it has over a restart."""
    found = {**info(host, "memory"), **info(host, "persistence")}
    bad = list(unfit(found, place_of(host.settings.broker)))
    limit = int(found["maxmemory"]) // _MIB
    return bad or ok(f"maxmemory {limit} MiB, {found['maxmemory_policy']}, an append-only file")


def unfit(found: Mapping[str, Any], where: Place) -> Iterator[Finding]:
    """Yield what an appliance must not have of Redis, by the answer to INFO, which every login may ask."""
    policy = found["maxmemory_policy"]
    fix = where.config("maxmemory-policy", "volatile-ttl")
    if policy.startswith("allkeys"):
        yield error(f"maxmemory-policy {policy} throws whole queues away when memory is short", fix)
    elif policy != "volatile-ttl":
        yield warning(f"maxmemory-policy is {policy}; volatile-ttl drops the oldest results first", fix)
    if not int(found["maxmemory"]):
        text = "Redis has no maxmemory: a backlog may take the whole host's memory"
        yield warning(text, where.config("maxmemory", "2gb"))
    if not int(found["aof_enabled"]):
        text = "appendonly is off: a restart of Redis loses the queue"
        yield warning(text, where.config("appendonly", "yes"))


def usage(host: Host) -> Finding:
    """Redis's memory is not nearly full."""
    found, where = info(host, "memory"), place_of(host.settings.broker)
    used, limit = int(found["used_memory"]), int(found["maxmemory"])
    if not limit:
        return ok(f"{used // _MIB} MiB used, without a limit")
    text = f"{used // _MIB} of {limit // _MIB} MiB used"
    if used < _FULL_SHARE * limit:
        return ok(text)
    return warning(f"{text}: soon new work is refused", f"gpuinfer queue status; {where.cli('MEMORY STATS')}")


def evictions(host: Host) -> Finding:
    """No result was dropped before its time."""
    count = int(info(host, "stats")["evicted_keys"])
    if not count:
        return ok("no result was dropped for want of memory")
    return warning(
        f"{count} results were dropped before their time, for want of memory, since Redis's start",
        f"{edit('/etc/gpuinfer/gpuinfer.toml')} && {_RESTART}"
        "  # more redis.maxmemory_mb, or less queue.result_ttl_s",
    )


def file(host: Host) -> Findings:
    """What Redis wrote to its disk last was written."""
    found = info(host, "persistence")
    where = place_of(host.settings.broker)
    words = {"aof_last_write_status": "write", "aof_last_bgrewrite_status": "rewrite of its file"}
    bad = [f"last {word} failed" for key, word in words.items() if found.get(key, "ok") != "ok"]
    if bad:
        look = (
            f"df -h {redis_folder(host)}; journalctl -u gpuinfer-redis -n 20"
            if where.ours
            else where.cli("INFO persistence")
        )
        return error(f"Redis's {' and its '.join(bad)}: what is accepted now may be lost", look)
    return ok("Redis's last writes to its disk succeeded")


def unit_limit(host: Host) -> Finding:
    """The unit's MemoryMax is above maxmemory, so that the kernel does not kill a Redis that is just full."""
    if not place_of(host.settings.broker).ours:
        raise Skipped("broker.url names a Redis that is not this package's own")
    unit = show(host, ["gpuinfer-redis.service"], "LoadState,MemoryMax")[0]
    if unit.get("LoadState") != "loaded":
        raise Skipped("gpuinfer-redis.service is not installed")
    return judge_unit(unit.get("MemoryMax", "infinity"), int(info(host, "memory")["maxmemory"]))


def judge_unit(memory_max: str, maxmemory: int) -> Finding:
    """Compare systemd's MemoryMax, in bytes or ``infinity``, with maxmemory."""
    if not memory_max.isdecimal() or int(memory_max) >= 2**63:
        return ok("gpuinfer-redis.service has no MemoryMax")
    text = f"MemoryMax {int(memory_max) // _MIB} MiB, maxmemory {maxmemory // _MIB} MiB"
    if maxmemory and int(memory_max) >= _UNIT_FACTOR * maxmemory:
        return ok(text)
    return error(
        f"{text}: the kernel would kill Redis before it is full; {_UNIT_FACTOR:g} times maxmemory is right",
        f"systemctl set-property gpuinfer-redis MemoryMax={2 * maxmemory or 'infinity'}",
    )
