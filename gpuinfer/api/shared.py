# SPDX-License-Identifier: Apache-2.0
"""What all requests of one process share, and what they read of their scope."""

from __future__ import annotations

import asyncio

from starlette.types import Scope

from gpuinfer.api.request_log import RequestLog
from gpuinfer.client import AsyncClient
from gpuinfer.settings import Settings

_SHARED = "gpuinfer.shared"


class Shared:
    """The settings, the client and the request log of one process. It is in the scope of every request."""

    #: Set while the application runs, between its start and its end.
    client: AsyncClient

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        #: To be ticked once a second, and closed at the end.
        self.requests = RequestLog(settings.log.requests)
        #: Set once the process stops: no answer is waited for then.
        self.stopping = asyncio.Event()

    def enter(self, scope: Scope) -> None:
        """Let a request find this."""
        scope[_SHARED] = self


def shared(scope: Scope) -> Shared:
    """Return what the process shares."""
    found: Shared = scope[_SHARED]
    return found


def header(scope: Scope, name: bytes) -> str:
    """Return a request's header by its name in lower case; empty where it has none."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return ""
