# SPDX-License-Identifier: Apache-2.0
"""The tuning.conf of Redis's start: maxmemory, a share of the host's memory, and appendfsync."""

from __future__ import annotations

import os
from pathlib import Path

import redis

from gpuinfer.broker import durability
from gpuinfer.broker.durability import Choice
from gpuinfer.settings import RedisSettings

MIB = 1024 * 1024


def host_memory_bytes() -> int:
    """Return the host's physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def maxmemory_bytes(settings: RedisSettings, host_bytes: int) -> int:
    """Return Redis's maxmemory in bytes: as set, else a share of the host's within floor and ceiling."""
    if settings.maxmemory_mb:
        return settings.maxmemory_mb * MIB
    share = int(host_bytes * settings.maxmemory_share)
    bounded = max(settings.maxmemory_floor_mb * MIB, min(share, settings.maxmemory_ceiling_mb * MIB))
    return bounded // MIB * MIB


def values(settings: RedisSettings, host_bytes: int, choice: Choice) -> dict[str, str]:
    """Return Redis's option -> its value, as the settings have it."""
    return {"maxmemory": f"{maxmemory_bytes(settings, host_bytes) // MIB}mb", "appendfsync": choice.mode}


def apply(client: redis.Redis, wanted: dict[str, str], conf: Path = durability.REDIS_CONF) -> dict[str, str]:
    """Give a running Redis these values, or those of redis.conf, which win; return what changed.

    Raises redis-py's errors.
    """
    before = durability.configuration(client, *wanted)
    for key, value in wanted.items():
        client.config_set(key, durability.stated(conf, key) or value)
    after = durability.configuration(client, *wanted)
    return {key: after[key] for key in wanted if after[key] != before[key]}


def render(settings: RedisSettings, host_bytes: int, choice: Choice) -> str:
    """Return the text of tuning.conf, which redis.conf includes."""
    found = values(settings, host_bytes, choice)
    reason = (
        "redis.maxmemory_mb"
        if settings.maxmemory_mb
        else f"{settings.maxmemory_share:g} of the host's {host_bytes // MIB} MiB, "
        f"{settings.maxmemory_floor_mb} to {settings.maxmemory_ceiling_mb} MiB"
    )
    return (
        "# Written by `gpuinfer redis prepare` at each start from [redis] in gpuinfer.toml; do not edit.\n"
        f"# {reason}\n"
        f"maxmemory {found['maxmemory']}\n"
        f"# {choice.why}: {choice.means}\n"
        f"appendfsync {found['appendfsync']}\n"
    )
