# SPDX-License-Identifier: Apache-2.0
"""Around every request: logging, and ``Connection: close`` while the process stops."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpuinfer.api.accounting import Accounts
from gpuinfer.api.shared import Requests
from gpuinfer.log import get_logger

log = get_logger(__name__)

_NOTES, _ACTION = "gpuinfer.notes", "gpuinfer.action"


def note(scope: Scope, *, action: str | None = None, **fields: str | int | None) -> None:
    """Add fields to the request's log line, if it gets one. ``action`` names what was done."""
    known = {key: value[:200] if isinstance(value, str) else value for key, value in fields.items()}
    scope[_NOTES] = scope.get(_NOTES, {}) | known
    if action is not None:
        scope[_ACTION] = action


class Around:
    """Pure ASGI. Logs health probes at debug, and passes all other requests to the request log and accounts.

    Bodies are never logged.
    """

    def __init__(self, app: ASGIApp, stopping: asyncio.Event, requests: Requests, accounts: Accounts) -> None:
        self._app = app
        self._stopping = stopping
        self._requests = requests
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 500, 0

        async def watched(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            elif message["type"] == "http.response.start":
                status = message["status"]
                if self._stopping.is_set():
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._note(scope, status, sent, time.perf_counter() - began)

    def _note(self, scope: Scope, status: int, sent: int, seconds: float) -> None:
        path: str = scope["path"]
        notes = scope.get(_NOTES, {})
        fields = {"method": scope["method"], "path": path[:200], "status": status, **notes}
        action = scope.get(_ACTION, "request")
        if path.startswith("/health/"):
            log.debug(action, **fields, duration_ms=round(seconds * 1000, 2))
        else:
            self._requests.add(action, status, seconds, fields)
            self._accounts.add(scope, status, sent, notes.get("code"))
