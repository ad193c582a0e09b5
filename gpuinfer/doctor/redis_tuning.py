# SPDX-License-Identifier: Apache-2.0
"""Redis's memory and its file: as an appliance needs them, and as they were configured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gpuinfer.broker.tuning import host_memory_bytes, render
from gpuinfer.doctor.broker import asked, info
from gpuinfer.doctor.disk import redis_folder
from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_place import OUR_CONF, Place, place_of
from gpuinfer.doctor.units import show

CONF, TUNING = OUR_CONF, "/run/gpuinfer/redis/tuning.conf"
_MIB = 1024 * 1024
_KEYS = ("maxmemory", "maxmemory-policy", "appendonly", "appendfsync")
#: A rewrite of the AOF in a forked child copies what is written meanwhile; some room is for that.
_UNIT_FACTOR = 1.2
_FULL_SHARE = 0.85
_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1024, "m": 1000**2, "mb": 1024**2, "g": 1000**3, "gb": 1024**3}
_RESTART = "systemctl restart gpuinfer-redis"


def running(host: Host) -> Mapping[str, str]:
    """Return what CONFIG GET answers for our keys. Raises Skipped."""
    with asked(host) as client:
        answer: Mapping[Any, Any] = client.config_get(*_KEYS)
    return {_text(key): _text(value) for key, value in answer.items()}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def limits(host: Host) -> Findings:
    """Redis has a limit, evicts results alone, and keeps what it has over a restart."""
    found, where = running(host), place_of(host.settings.broker)
    ill = list(unfit(found, where))
    limit = int(found["maxmemory"]) // _MIB
    return ill or ok(
        f"maxmemory {limit} MiB, {found['maxmemory-policy']}, appendfsync {found['appendfsync']}"
    )


def unfit(found: Mapping[str, str], where: Place) -> Iterator[Finding]:
    """Yield what an appliance must not have of Redis, by the answer to CONFIG GET."""
    policy = found["maxmemory-policy"]
    mend = where.config("maxmemory-policy", "volatile-ttl")
    if policy.startswith("allkeys"):
        yield error(f"maxmemory-policy {policy} throws whole queues away when memory is short", mend)
    elif policy != "volatile-ttl":
        yield warning(f"maxmemory-policy is {policy}; volatile-ttl drops the oldest results first", mend)
    if found["maxmemory"] == "0":
        text = "Redis has no maxmemory: a backlog may take the whole host's memory"
        yield warning(text, where.config("maxmemory", "2gb"))
    if found["appendonly"] != "yes":
        text = "appendonly is off: a restart of Redis loses the queue"
        yield warning(text, where.config("appendonly", "yes"))


def as_configured(host: Host) -> Findings:
    """The running instance does what its files and the settings say, as they are now."""
    if not place_of(host.settings.broker).ours:
        raise Skipped("broker.url names a Redis that is not this package's own")
    found, wanted = running(host), stated(host, CONF)
    if not wanted:
        raise Skipped(f"{CONF} states none of {', '.join(_KEYS)}")
    off = [key for key, value in wanted.items() if found.get(key) != value]
    if off:
        words = "; ".join(f"{key} is {found.get(key)}, {CONF} says {wanted[key]}" for key in off)
        return warning(words, _RESTART)
    return ok(f"runs as {CONF} says: {', '.join(wanted)}")


def stated(host: Host, file: str) -> dict[str, str]:
    """Return our keys as a redis.conf and what it includes state them: the last one wins, as in Redis."""
    return parse(host, host.read(file))


def parse(host: Host, text: str) -> dict[str, str]:
    """Return our keys as the text of a redis.conf states them."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        word, value = (*line.split(None, 1), "", "")[:2]
        value = value.strip().strip("\"'")
        if word.lower() == "include":
            for path in sorted(_included(host, value)):
                found |= parse(host, _tuned(host) if path == TUNING else host.read(path))
        elif word.lower() in _KEYS:
            found[word.lower()] = str(to_bytes(value)) if word.lower() == "maxmemory" else value.lower()
    return found


def _tuned(host: Host) -> str:
    """Return tuning.conf as the next start would write it: the settings may have changed since the last."""
    return render(host.settings.redis, host_memory_bytes())


def _included(host: Host, pattern: str) -> list[str]:
    return ["/" + str(path.relative_to(host.root)) for path in host.root.glob(pattern.lstrip("/"))]


def to_bytes(text: str) -> int:
    """Return a size of redis.conf in bytes: 2gb, 512mb, 1000000."""
    match = re.fullmatch(r"(\d+)([a-z]*)", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size, such as 512mb")
    return int(match[1]) * _UNITS[match[2]]


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
    ill = [f"last {word} failed" for key, word in words.items() if found.get(key, "ok") != "ok"]
    if ill:
        look = (
            f"df -h {redis_folder(host)}; journalctl -u gpuinfer-redis -n 20"
            if where.ours
            else where.cli("INFO persistence")
        )
        return error(f"Redis's {' and its '.join(ill)}: what is accepted now may be lost", look)
    return ok("Redis's last writes to its disk succeeded")


def unit_limit(host: Host) -> Finding:
    """The unit's MemoryMax is above maxmemory, so that the kernel does not kill a Redis that is just full."""
    if not place_of(host.settings.broker).ours:
        raise Skipped("broker.url names a Redis that is not this package's own")
    unit = show(host, ["gpuinfer-redis.service"], "LoadState,MemoryMax")[0]
    if unit.get("LoadState") != "loaded":
        raise Skipped("gpuinfer-redis.service is not installed")
    return judge_unit(unit.get("MemoryMax", "infinity"), int(running(host)["maxmemory"]))


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
