# SPDX-License-Identifier: Apache-2.0
"""State shared by all requests of one process."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.types import Scope

from gpuinfer.api.accounting import Accounts
from gpuinfer.api.drain import Drain
from gpuinfer.api.holding import Holding
from gpuinfer.api.lasting import Lastings
from gpuinfer.api.network import Network
from gpuinfer.api.receiving import PERMITS, Receiver
from gpuinfer.api.request_log import RequestLog
from gpuinfer.client import AsyncClient
from gpuinfer.errors import GpuinferError, KeyQuota, QueueFull, RateLimited
from gpuinfer.keys.folder import KeyFolder
from gpuinfer.metrics.page import Page
from gpuinfer.settings import Settings

#: Seconds of a wait after which it is checked whether the client has disconnected.
ASK_AFTER_S = 0.05
_SHARED = "gpuinfer.shared"
_HEADERS = "gpuinfer.headers"


class Wait(Protocol):
    """A waiting request."""

    def end(self) -> None:
        """End the wait now."""


class Requests(Protocol):
    """Receives all requests: the log, or the parent process that writes it."""

    def count(self, status: int, seconds: float) -> bool:
        """Count a successful request; if it returns False, call ``add``, as it needs a line."""

    def add(self, action: str, status: int, seconds: float, fields: dict[str, Any]) -> None:
        """Record an answered request."""

    def tick(self) -> None:
        """Write or send what is due."""

    def close(self) -> None:
        """Write or send the rest."""


class Shared:
    """The settings, the client and the request log of one process. It is in the scope of every request."""

    #: Set while the application runs, between its start and its end.
    client: AsyncClient

    def __init__(
        self,
        settings: Settings,
        requests: Requests | None = None,
        metrics_listeners: Sequence[socket.socket] = (),
    ) -> None:
        self.settings = settings
        self.metrics = Page(settings)
        self.metrics_listeners = metrics_listeners
        #: Refreshed twice a second.
        self.keys = KeyFolder(settings.api.keys_dir)
        self.keys.refresh()
        self.network = Network(settings.api, socket.gethostname())
        #: Call ``tick`` once a second, ``close`` at the end.
        self.requests = requests or RequestLog(settings.log.requests)
        #: Sent to Redis once a second, and at the end.
        self.accounts = Accounts()
        most_bytes = settings.api.max_held_mb * 2**20
        self.receiver = Receiver(Holding(most_bytes, settings.api.body_stall_s, time.monotonic))
        self.drain = Drain(settings.api.retry_after_s, time.monotonic)
        #: Number of requests in progress.
        self.requests_now = 0
        #: Set once the process stops; waits end then.
        self.stopping = asyncio.Event()
        #: Requests that wait for the end of a task.
        self.waits: set[Wait] = set()
        #: The timer for those that wait long.
        self.lastings = Lastings(ASK_AFTER_S)

    def stop(self) -> None:
        """End all waits; each caller gets its task's current state."""
        self.stopping.set()
        for wait in list(self.waits):
            wait.end()

    def enter(self, scope: Scope) -> None:
        """Store this in a request's scope."""
        scope[_SHARED] = self
        scope[PERMITS] = []

    def retry_after(self, error: GpuinferError, status: int) -> int | None:
        """Return Retry-After in seconds for an error and its status; None: no header."""
        if isinstance(error, RateLimited):
            return max(1, math.ceil(error.retry_after_s))
        if isinstance(error, QueueFull) and not isinstance(error, KeyQuota):
            return self.drain.refuse()
        return self.settings.api.retry_after_s if status in (429, 503) else None


def shared(scope: Scope) -> Shared:
    """Return the shared state."""
    found: Shared = scope[_SHARED]
    return found


def header(scope: Scope, name: bytes) -> str:
    """Return a request's header by its lower-case name; empty if missing."""
    known: dict[bytes, bytes] | None = scope.get(_HEADERS)
    if known is None:  # of several, the first counts
        known = scope[_HEADERS] = dict(reversed(scope["headers"]))
    value = known.get(name)
    return "" if value is None else value.decode("latin-1")
