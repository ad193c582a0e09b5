# SPDX-License-Identifier: Apache-2.0
"""The page that a monitoring system scrapes, made at most once a second for all scrapers.

One thread reads Redis, for any number of waiting scrapes. If Redis accepts connections but does not answer,
no scrape waits longer than ``broker.connect_timeout_s``.
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

#: Seconds for which a snapshot is reused.
FRESH_S = 1.0
#: Value of the label "folder" -> folder whose disk is measured.
FOLDERS = {"state": "/var/lib/gpuinfer"}


class Page:
    """The metrics of one process. ``read`` may be called from any thread; only one reads Redis at a time."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._broker = settings.broker
        fleet = settings.metrics.fleet
        self._fleet = is_redis_host(settings.broker) if fleet == "auto" else fleet == "always"
        self._clock = clock
        #: Guards the current snapshot; guards the label values while a page is rendered.
        self._lock, self._showing = threading.Lock(), threading.Lock()
        self._client: redis.Redis | None = None
        self._host = Host(socket.gethostname(), self._fleet, folders=FOLDERS)
        self._made_at = -FRESH_S
        self._look: Future[Snapshot | None] | None = None
        self._overdue_at = 0.0

    async def answer(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type, without blocking the event loop."""
        look, left_s = self._looking()
        if not look.done() and left_s > 0:
            await asyncio.wait([asyncio.wrap_future(look)], timeout=left_s)
        seen = _seen(look)
        if seen is None:  # a few lines: a thread would cost more
            return self._shown(None, accept)
        return await asyncio.to_thread(self._shown, seen, accept)

    def read(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type: OpenMetrics if accepted, else Prometheus's text format."""
        look, left_s = self._looking()
        with suppress(TimeoutError):
            look.exception(max(0.0, left_s))
        return self._shown(_seen(look), accept)

    def _looking(self) -> tuple[Future[Snapshot | None], float]:
        """Return the current snapshot's future, and how many seconds a scrape may wait for it."""
        with self._lock:
            look = self._look
            if look is None or (look.done() and self._clock() - self._made_at >= FRESH_S):
                look = self._look = Future()
                look.set_running_or_notify_cancel()  # a cancelled scrape must not cancel it for the others
                self._overdue_at = time.monotonic() + self._broker.connect_timeout_s
                # Not in the event loop's thread pool, which is small: a hanging Redis would use it up.
                threading.Thread(target=self._run, args=(look,), name="metrics", daemon=True).start()
            return look, self._overdue_at - time.monotonic()

    def _run(self, look: Future[Snapshot | None]) -> None:
        try:
            seen = self._gathered()
        except Exception as exc:  # a bug: raise it in the waiting scrapes
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
        """Close the connection; a read that waits for an answer ends."""
        with suppress(redis.RedisError, OSError):
            if self._client is not None:
                self._client.close()


def _seen(look: Future[Snapshot | None]) -> Snapshot | None:
    """Return the snapshot; None if Redis is unavailable or has not answered yet."""
    return look.result() if look.done() else None
