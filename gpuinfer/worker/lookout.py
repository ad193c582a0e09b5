# SPDX-License-Identifier: Apache-2.0
"""Looks into the lists for producers that do not ring: plain Celery ones.

A thread of its own: a timer in Celery's event loop takes five times as much of a core, and stands in the
way of the task that comes meanwhile. It only looks; to claim is the event loop's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import redis

from gpuinfer.queue.store import Store

#: Seconds that a look may still take when the worker stops: Redis may be deaf.
STOP_TIMEOUT_S = 1.0


class Lookout:
    """Asks Redis every ``poll_s`` seconds whether something waits, and says so by ``tell``."""

    def __init__(self, store: Store, poll_s: float) -> None:
        self._store = store
        self._poll_s = poll_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        #: Called in this thread when something waits: hands a claim to the event loop.
        self.tell: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Begin to look. The second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while not self._done.wait(self._poll_s):
            try:
                waits = self._store.waits()
            except (redis.RedisError, OSError):
                continue  # the connection says so, once
            if waits:
                self.tell()
