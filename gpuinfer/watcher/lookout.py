# SPDX-License-Identifier: Apache-2.0
"""Looks for trouble that people are to be told of, at each probe of a watcher."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from gpuinfer.broker import durability
from gpuinfer.redis_url import parse
from gpuinfer.settings import Settings
from gpuinfer.watcher import alerts
from gpuinfer.watcher.alerting import Alerting
from gpuinfer.watcher.alerts import Alert, Event
from gpuinfer.watcher.policy import Decision
from gpuinfer.watcher.state import Observation

#: Redis's memory and the disks are measured this often.
MEASURE_EVERY_S = 5.0


class Lookout:
    """One watcher's. Blocking: call it in a thread."""

    def __init__(self, settings: Settings, client: redis.Redis, host: str, alerting: Alerting) -> None:
        self._folders = disks(settings)
        self._client = client
        self._host = host
        self._alerting = alerting
        self._memory = (0, 0)
        self._free: Mapping[str, int] = {}
        self._measured_at = -math.inf

    def look(self, decision: Decision, seen: Observation, now: float) -> list[Event]:
        """Return what is to be told. The first of the hosts whose watchers live speaks for the fleet."""
        away = seen.queues is None
        if time.monotonic() - self._measured_at >= MEASURE_EVERY_S:
            self._measured_at = time.monotonic()
            self._free = free_bytes(self._folders)
            self._memory = self._memory if away else self._redis_memory()
        own = [one for one in seen.instances if seen.owns(one.key)]
        first = not seen.live_hosts or self._host == min(seen.live_hosts)
        ours: list[Alert] = [*alerts.of_workers(own, decision.history.units, now)]
        ours += alerts.of_disks(self._free)
        if away:
            ours.append(alerts.away(seen.trouble))
        elif first:
            ours += alerts.of_memory(*self._memory)
        fleet = [*alerts.of_queues(seen.dead_letters, decision.stranded)] if first else None
        return self._alerting.look(self._client, ours, fleet, now, away=away)

    def _redis_memory(self) -> tuple[int, int]:
        """Return the bytes that Redis uses, and its limit, 0 for none."""
        with suppress(redis.RedisError, OSError):
            info: Mapping[str, Any] = self._client.info("memory")
            return int(info["used_memory"]), int(info["maxmemory"])
        return self._memory


def disks(settings: Settings) -> list[Path]:
    """Return the folders whose disks must not be full: models, and our own Redis's file where it is here."""
    folders = [folder for folder in settings.models.folders if folder.exists()][:1]
    if parse(settings.broker.url).scheme == "unix" and durability.REDIS_CONF.exists():
        folders.append(durability.folder_of())
    return folders


def free_bytes(folders: Iterable[Path]) -> dict[str, int]:
    """Return the room that is left, by folder; of folders on one disk, the first."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for folder in folders:
        with suppress(OSError):
            device = folder.stat().st_dev
            if device not in seen:
                seen.add(device)
                room = os.statvfs(folder)
                found[str(folder)] = room.f_bavail * room.f_frsize
    return found
