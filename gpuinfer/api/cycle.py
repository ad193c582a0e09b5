# SPDX-License-Identifier: Apache-2.0
"""One request and its answer, as uvicorn has it, with a short way for answers that are whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle


class Cycle(RequestResponseCycle):
    """A request. ``send`` takes ASGI's messages; ``answer`` does what two of them would."""

    def answer(
        self, status: int, content_type: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> bool:
        """Send a whole answer in one packet; False: it cannot be, so send it by messages.

        ``headers`` are those beside type and length, with names that are known to be right. Raises
        RuntimeError for a value that HTTP does not allow.
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
    """Return the ``answer`` of the request that a ``send`` belongs to; None where it has none."""
    cycle = getattr(send, "__self__", None)
    return cycle.answer if isinstance(cycle, Cycle) else None
