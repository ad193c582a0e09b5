# SPDX-License-Identifier: Apache-2.0
"""What happens around every request: one log line, and ``Connection: close`` once we are stopping."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpuinfer.log import get_logger

log = get_logger(__name__)

_NOTES, _ACTION = "gpuinfer.notes", "gpuinfer.action"


def note(scope: Scope, *, action: str | None = None, **fields: str | int | None) -> None:
    """Have the request's log line say this, too; ``action`` names what has been done, for ``request``."""
    known = {key: value[:200] if isinstance(value, str) else value for key, value in fields.items()}
    scope[_NOTES] = scope.get(_NOTES, {}) | known
    if action is not None:
        scope[_ACTION] = action


class Around:
    """Pure ASGI. Logs health probes at debug, our own failures as warnings, all else at info.

    What a body holds is never logged.
    """

    def __init__(self, app: ASGIApp, stopping: asyncio.Event) -> None:
        self._app = app
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._stopping.is_set():
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            _write(scope, status, time.perf_counter() - began)


def _write(scope: Scope, status: int, seconds: float) -> None:
    path: str = scope["path"]
    fields = {"method": scope["method"], "path": path[:200], "status": status, **scope.get(_NOTES, {})}
    say = log.debug if path.startswith("/health/") else log.warning if status >= 500 else log.info
    say(scope.get(_ACTION, "request"), **fields, duration_ms=round(seconds * 1000, 2))
