# SPDX-License-Identifier: Apache-2.0
"""What all requests of one process share, and what they read of their scope."""

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

#: Seconds of a wait after which it ends with its caller's connection.
ASK_AFTER_S = 0.05
_SHARED = "gpuinfer.shared"
_HEADERS = "gpuinfer.headers"


class Wait(Protocol):
    """A caller that waits."""

    def end(self) -> None:
        """Let it wait no longer."""


class Requests(Protocol):
    """Who hears of requests: the log, or the process that writes it."""

    def count(self, status: int, seconds: float) -> bool:
        """Note a request that has succeeded; False: it is to have a line, so ``add`` it."""

    def add(self, action: str, status: int, seconds: float, fields: dict[str, Any]) -> None:
        """Note a request that has been answered."""

    def tick(self) -> None:
        """Pass on what is due."""

    def close(self) -> None:
        """Pass on the rest."""


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
        #: To be looked at twice a second.
        self.keys = KeyFolder(settings.api.keys_dir)
        self.keys.refresh()
        self.network = Network(settings.api, socket.gethostname())
        #: To be ticked once a second, and closed at the end.
        self.requests = requests or RequestLog(settings.log.requests)
        #: Told to Redis once a second, and at the end.
        self.accounts = Accounts()
        most_bytes = settings.api.max_held_mb * 2**20
        self.receiver = Receiver(Holding(most_bytes, settings.api.body_stall_s, time.monotonic))
        self.drain = Drain(settings.api.retry_after_s, time.monotonic)
        #: Requests that are in progress.
        self.requests_now = 0
        #: Set once the process stops: no answer is waited for then.
        self.stopping = asyncio.Event()
        #: What waits for the end of a task.
        self.waits: set[Wait] = set()
        #: Those of them that may last.
        self.lastings = Lastings(ASK_AFTER_S)

    def stop(self) -> None:
        """End all waits: each caller is told how its task stands."""
        self.stopping.set()
        for wait in list(self.waits):
            wait.end()

    def enter(self, scope: Scope) -> None:
        """Let a request find this."""
        scope[_SHARED] = self
        scope[PERMITS] = []

    def retry_after(self, error: GpuinferError, status: int) -> int | None:
        """Return what Retry-After says with an error and its status, in seconds; None: no header."""
        if isinstance(error, RateLimited):
            return max(1, math.ceil(error.retry_after_s))
        if isinstance(error, QueueFull) and not isinstance(error, KeyQuota):
            return self.drain.refuse()
        return self.settings.api.retry_after_s if status in (429, 503) else None


def shared(scope: Scope) -> Shared:
    """Return what the process shares."""
    found: Shared = scope[_SHARED]
    return found


def header(scope: Scope, name: bytes) -> str:
    """Return a request's header by its name in lower case; empty where it has none."""
    known: dict[bytes, bytes] | None = scope.get(_HEADERS)
    if known is None:  # the first of several counts
        known = scope[_HEADERS] = dict(reversed(scope["headers"]))
    value = known.get(name)
    return "" if value is None else value.decode("latin-1")
