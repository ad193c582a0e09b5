# SPDX-License-Identifier: Apache-2.0
"""The page that a monitoring system scrapes: made at most once a second, for all who ask.

One thread looks at Redis, however many scrapes wait for it. A Redis that accepts and does not answer holds
none of them up for longer than ``broker.connect_timeout_s``.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
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
        #: Over which look counts; and over the labels' names, while a page is shown.
        self._lock, self._showing = threading.Lock(), threading.Lock()
        self._client: redis.Redis | None = None
        self._host = Host(socket.gethostname(), self._fleet, folders=FOLDERS)
        self._made_at = -FRESH_S
        self._look: Future[Snapshot | None] | None = None
        self._overdue_at = 0.0

    async def answer(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type, without holding up the event loop."""
        look, left_s = self._looking()
        if not look.done() and left_s > 0:
            await asyncio.wait([asyncio.wrap_future(look)], timeout=left_s)
        seen = _seen(look)
        if seen is None:  # a few lines: no thread is worth it
            return self._shown(None, accept)
        return await asyncio.to_thread(self._shown, seen, accept)

    def read(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type: OpenMetrics where that is accepted, else plain text."""
        look, left_s = self._looking()
        with suppress(TimeoutError):
            look.exception(max(0.0, left_s))
        return self._shown(_seen(look), accept)

    def _looking(self) -> tuple[Future[Snapshot | None], float]:
        """Return the look that counts now, and for how many seconds a scrape waits for it."""
        with self._lock:
            look = self._look
            if look is None or (look.done() and self._clock() - self._made_at >= FRESH_S):
                look = self._look = Future()
                look.set_running_or_notify_cancel()  # a scrape that goes away cancels it for nobody
                self._overdue_at = time.monotonic() + self._broker.connect_timeout_s
                # Not one of the event loop's threads: they are few, and a deaf Redis would take them all.
                threading.Thread(target=self._run, args=(look,), name="metrics", daemon=True).start()
            return look, self._overdue_at - time.monotonic()

    def _run(self, look: Future[Snapshot | None]) -> None:
        try:
            seen = self._gathered()
        except Exception as exc:  # a bug: the scrapes that wait raise it
            self._made_at = self._clock()
            look.set_exception(exc)
        else:
            self._made_at = self._clock()
            look.set_result(seen)

    def _gathered(self) -> Snapshot | None:
        if self._client is None:
            self._client = connect(self._broker)
        self._host.durability = durability(self._broker)
        try:
            return gather(self._client, weigh=self._fleet)
        except (redis.RedisError, OSError, GpuinferError):
            return None

    def _shown(self, seen: Snapshot | None, accept: str) -> tuple[bytes, str]:
        registry = CollectorRegistry()
        with self._showing:
            registry.register(Fleet(seen, self._host))
            encode, content_type = choose_encoder(accept)
            return encode(registry), content_type

    def close(self) -> None:
        """Close the connection; a look that still waits for an answer ends."""
        with suppress(redis.RedisError, OSError):
            if self._client is not None:
                self._client.close()


def _seen(look: Future[Snapshot | None]) -> Snapshot | None:
    """Return what a look has found; None where Redis is away, or has not answered yet."""
    return look.result() if look.done() else None
