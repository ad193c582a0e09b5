# SPDX-License-Identifier: Apache-2.0
"""The page that a monitoring system scrapes: made at most once a second, whoever asks."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import redis
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from gpuinfer.errors import GpuinferError
from gpuinfer.metrics.collector import Fleet, Host
from gpuinfer.metrics.gather import Snapshot, durability, gather, is_redis_host
from gpuinfer.queue.connection import connect
from gpuinfer.settings import Settings

#: Seconds for which what was found is shown again.
FRESH_S = 1.0
#: Whose disks are shown, by the name they have there.
FOLDERS = {"state": "/var/lib/gpuinfer"}


class Page:
    """The metrics of one process. ``read`` may be called from any thread; one at a time looks."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._broker = settings.broker
        fleet = settings.metrics.fleet
        self._fleet = is_redis_host(settings.broker) if fleet == "auto" else fleet == "always"
        self._clock = clock
        self._lock = threading.Lock()
        self._client: redis.Redis | None = None
        self._host = Host(socket.gethostname(), self._fleet, folders=FOLDERS)
        self._made_at = -FRESH_S
        self._seen: Snapshot | None = None

    async def answer(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type, without holding up the event loop."""
        return await asyncio.to_thread(self.read, accept)

    def read(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type: OpenMetrics where that is accepted, else plain text."""
        with self._lock:
            if self._clock() - self._made_at >= FRESH_S:
                self._seen = self._look()
                self._made_at = self._clock()
            registry = CollectorRegistry()
            registry.register(Fleet(self._seen, self._host))
            encode, content_type = choose_encoder(accept)
            return encode(registry), content_type

    def _look(self) -> Snapshot | None:
        if self._client is None:
            self._client = connect(self._broker)
        self._host.durability = durability(self._broker)
        try:
            return gather(self._client, weigh=self._fleet)
        except (redis.RedisError, OSError, GpuinferError):
            return None

    def close(self) -> None:
        """Close the connection."""
        with self._lock, suppress(redis.RedisError, OSError):
            if self._client is not None:
                self._client.close()
