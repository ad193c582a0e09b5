# SPDX-License-Identifier: Apache-2.0
"""What happens around every request: one log line, and ``Connection: close`` once we are stopping."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpuinfer.log import get_logger

log = get_logger(__name__)

_TASK = "gpuinfer.task_id"


def note_task(scope: Scope, task_id: str) -> None:
    """Have the request's log line name this task."""
    scope[_TASK] = task_id[:200]


class Around:
    """Pure ASGI. Logs health probes at debug, all else at info, and never what a body holds."""

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
    fields = {"method": scope["method"], "path": path[:200], "status": status}
    if _TASK in scope:
        fields["task_id"] = scope[_TASK]
    say = log.debug if path.startswith("/health/") else log.info
    say("request", **fields, duration_ms=round(seconds * 1000, 2))
