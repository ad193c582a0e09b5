# SPDX-License-Identifier: Apache-2.0
"""A worker's periodic work for the queue: write counts, pass tasks on to their model, trim dead letters.

If Redis is away or refuses, the work is tried again next time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import redis

from gpuinfer.queue.router import Router
from gpuinfer.queue.store import Store
from gpuinfer.worker.accounting import Accounts
from gpuinfer.worker.outbox import Outbox

#: Seconds between two searches for tasks that are in the default model's lists but are for another model.
ROUTE_EVERY_S = 1.0
#: Seconds between two searches for dead letters that are too old.
TRIM_EVERY_S = 60.0


class Upkeep:
    """The periodic work of one worker, on its main thread."""

    def __init__(
        self,
        store: Store,
        router: Router,
        accounts: Accounts,
        outbox: Outbox,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._router = router
        self._accounts = accounts
        self._outbox = outbox
        self._clock = clock
        self._routed_at = clock()
        self._trimmed_at = -math.inf

    def flush(self, *, last: bool = False) -> None:
        """Write the counts to Redis, once a second; with ``last``, now."""
        self._try("account", lambda: self._accounts.flush(last=last))

    def tick(self) -> None:
        """Do what is due."""
        if self._clock() - self._routed_at >= ROUTE_EVERY_S:
            self._routed_at = self._clock()
            self._try("pass on", self._router.pass_on)
        if self._clock() - self._trimmed_at >= TRIM_EVERY_S:
            self._trimmed_at = self._clock()
            self._try("drop old dead letters", self._store.burial.trim)

    def _try(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (redis.RedisError, OSError) as exc:
            self._outbox.trouble(what, exc)
