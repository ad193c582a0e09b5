# SPDX-License-Identifier: Apache-2.0
"""Alerts for what is nearly full: Redis's memory, and the disks of the models and of Redis's file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from gpuinfer.alerts.register import Alert
from gpuinfer.broker import durability
from gpuinfer.redis_url import parse
from gpuinfer.settings import Settings

#: Memory and disks are measured this often, in seconds.
MEASURE_EVERY_S = 5.0
#: The share of Redis's memory above which new work is about to be refused.
FULL_SHARE = 0.95
#: Free bytes below which a disk is nearly full.
LOW_BYTES = 1024**3


class Resources:
    """Measures Redis's memory and this host's disks. Blocking: call it in a thread."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._folders = disks(settings)
        self._client = client
        self._measured_at: float | None = None
        self._memory = (0, 0)
        self._free: Mapping[str, int] = {}

    def measure(self, *, away: bool) -> tuple[list[Alert], list[Alert]]:
        """Return the alerts for disks and for Redis's memory; ``away``: Redis does not answer."""
        now = time.monotonic()
        if self._measured_at is None or now - self._measured_at >= MEASURE_EVERY_S:
            self._measured_at = now
            self._free = free_bytes(self._folders)
            if not away:
                self._measure_redis()
        return [*of_disks(self._free)], [*of_memory(*self._memory)]

    def _measure_redis(self) -> None:
        with suppress(redis.RedisError, OSError):  # the next probe reports that Redis is away
            info: Mapping[str, Any] = self._client.info("memory")
            self._memory = (int(info["used_memory"]), int(info["maxmemory"]))


def of_memory(used: int, limit: int) -> Iterator[Alert]:
    """Yield an alert when Redis's memory is nearly full, in bytes; ``limit`` 0: it has no limit."""
    if limit and used >= FULL_SHARE * limit:
        text = f"Redis is full: {used // 2**20} of {limit // 2**20} MiB used; new work is refused"
        yield Alert("redis-full", text, "gpuinfer queue status")


def of_disks(free: Mapping[str, int]) -> Iterator[Alert]:
    """Yield an alert for each disk that is nearly full; ``free``: folder -> free bytes."""
    for place, (folder, left) in enumerate(free.items()):
        if left < LOW_BYTES:
            text = f"{folder} has {left / 2**30:.1f} GiB free; a full disk makes Redis refuse all writes"
            yield Alert(f"disk.{place}", text, f"du -xh --max-depth=2 {folder} | sort -h | tail")


def disks(settings: Settings) -> list[Path]:
    """Return the folders whose disks must not be full: models, and our own Redis's file if it is here."""
    folders = [folder for folder in settings.models.folders if folder.exists()][:1]
    if parse(settings.broker.url).scheme == "unix" and durability.REDIS_CONF.exists():
        folders.append(durability.folder_of())
    return folders


def free_bytes(folders: Iterable[Path]) -> dict[str, int]:
    """Return the free bytes of each folder's disk; of several folders on one disk, only the first counts."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for folder in folders:
        with suppress(OSError):
            device = folder.stat().st_dev
            if device not in seen:
                seen.add(device)
                disk = os.statvfs(folder)
                found[str(folder)] = disk.f_bavail * disk.f_frsize
    return found
