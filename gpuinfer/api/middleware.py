# SPDX-License-Identifier: Apache-2.0
"""Wraps every request: logging, and ``Connection: close`` while the process stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpuinfer.api.accounting import CALLER, Accounts
from gpuinfer.api.cycle import answer_of
from gpuinfer.api.shared import Requests
from gpuinfer.log import get_logger

log = get_logger(__name__)

_NOTES, _ACTION = "gpuinfer.notes", "gpuinfer.action"


def note(scope: Scope, *, action: str | None = None, **fields: str | int | None) -> None:
    """Add fields to the request's log line, if it gets one. ``action`` names what was done."""
    known = scope.get(_NOTES)
    if known is None:
        scope[_NOTES] = fields
    else:
        known.update(fields)
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
        began, watched = time.perf_counter(), _Watched(send, self._stopping)
        try:
            await self._app(scope, receive, watched)
        finally:
            self._note(scope, watched.status, watched.sent, time.perf_counter() - began)

    def _note(self, scope: Scope, status: int, sent: int, seconds: float) -> None:
        path: str = scope["path"]
        notes: Mapping[str, Any] = scope.get(_NOTES) or {}
        if path.startswith("/health/"):
            action, fields = _line(scope, status, notes)
            log.debug(action, **fields, duration_ms=round(seconds * 1000, 2))
            return
        if status >= 400 or not self._requests.count(status, seconds):
            action, fields = _line(scope, status, notes)
            self._requests.add(action, status, seconds, fields)
        self._accounts.add(scope, status, sent, notes.get("code"))


def _line(scope: Scope, status: int, notes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return action and fields of a request's log line."""
    known = {key: value[:200] if isinstance(value, str) else value for key, value in notes.items()}
    fields = {"method": scope["method"], "path": scope["path"][:200], "status": status, **known}
    if (who := scope.get(CALLER)) is not None and who.name:
        fields["key"] = who.name
    return scope.get(_ACTION, "request"), fields


class _Watched:
    """A ``send`` that records status and size of the answer."""

    __slots__ = ("_answer", "_send", "_stopping", "sent", "status")

    def __init__(self, send: Send, stopping: asyncio.Event) -> None:
        self._send = send
        self._stopping = stopping
        self._answer = answer_of(send)
        self.status, self.sent = 500, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            if self._stopping.is_set():
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        await self._send(message)

    def answer(
        self, status: int, content_type: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> bool:
        """Send a complete answer, like ``Cycle.answer``; if it returns False, send messages instead."""
        if self._answer is None or self._stopping.is_set():
            return False
        if not self._answer(status, content_type, headers, body):
            return False
        self.status, self.sent = status, len(body)
        return True
