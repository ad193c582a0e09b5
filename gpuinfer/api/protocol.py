# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP protocol, with bounds on the head of a request: its bytes, and how long it may take.

uvicorn itself waits for ever for the first request of a connection, and for the rest of a head.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

#: Seconds in which a head must have come, from the opening of a connection or from the head's first byte.
HEAD_S = 10.0
#: Bytes that a head may have, about: it is measured by what was received since it began.
HEAD_BYTES = 64 * 1024


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(
            HEAD_S, self._refuse, 408, "slow_head", "the request's headers did not arrive in time"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._disarm()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            words = f"the request's head has more than {HEAD_BYTES} bytes"
            self._refuse(431, "head_too_large", words)
        elif self._late is None:
            self._late = self.loop.call_later(
                HEAD_S, self._refuse, 408, "slow_head", "the request's headers did not arrive in time"
            )

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: int, code: str, words: str) -> None:
        """Answer what is no request yet, and close."""
        self._disarm()
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": {"code": code, "message": words}}) + b"\n"
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(
            body
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, as JSON like every error."""
        self._refuse(400, "malformed_request", msg)
