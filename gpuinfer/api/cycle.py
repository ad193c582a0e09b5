# SPDX-License-Identifier: Apache-2.0
"""uvicorn's request cycle, with a fast path for complete answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle


class Cycle(RequestResponseCycle):
    """A request. ``send`` takes ASGI messages; ``answer`` replaces the two messages of a complete answer."""

    def answer(
        self, status: int, content_type: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> bool:
        """Send a complete answer in one packet; if it returns False, use ``send`` instead.

        ``headers``: those beside content type and length; their names must be valid. Raises RuntimeError for
        an invalid header value.
        """
        if self.response_started or self.disconnected or self.flow.write_paused:
            return False
        head = [STATUS_LINE[status]]
        for name, value in self.default_headers:
            head += (name, b": ", value, b"\r\n")
        closes = False
        for name, value in headers:
            if HEADER_VALUE_RE.search(value):
                raise RuntimeError("Invalid HTTP header value.")
            if name == b"connection":
                closes = closes or value.lower() == b"close"
            head += (name, b": ", value, b"\r\n")
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            head.append(b"connection: close\r\n")
        head.append(b"content-type: %b\r\ncontent-length: %d\r\n\r\n" % (content_type, len(body)))
        head.append(body)
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join(head))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True


def answer_of(send: Any) -> Any:
    """Return the ``answer`` method of the request that ``send`` belongs to; None if it has none."""
    cycle = getattr(send, "__self__", None)
    return cycle.answer if isinstance(cycle, Cycle) else None
