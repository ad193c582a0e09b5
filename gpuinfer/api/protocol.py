# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP protocol, with limits on the size and time of a request's head.

uvicorn waits forever for the first request of a connection, and for the rest of a head. The work per request
is reimplemented here to be faster; uvicorn, for example, creates and cancels a timer per request.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
from typing import Any, cast
from urllib.parse import unquote

import httptools
import orjson
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gpuinfer.api.cycle import Cycle

#: Seconds for a head to arrive, from the opening of the connection or the head's first byte.
HEAD_S = 10.0
#: Approximate maximum bytes of a head, measured by the bytes received since it began.
HEAD_BYTES = 64 * 1024
#: Maximum pipelined requests behind the current one; the connection closes after the last of them.
MOST_BEHIND = 100
#: Seconds for the TLS shutdown of an idle connection when the server stops.
TLS_GOODBYE_S = 0.3


class Protocol(HttpToolsProtocol):
    """One connection. Supports neither WebSockets nor uvicorn's own concurrency limit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        #: Whether a request is incomplete, and whether part of its body has arrived.
        self._in_body = self._body_came = False
        #: Whether too many requests are pipelined; further data is dropped.
        self._overrun = False
        self._late: asyncio.TimerHandle | None = None
        #: Since when no request is in progress, ignoring the unread rest of an answered one; None: one is.
        self._idle_since: float | None = None
        #: Closes the connection after it was idle for too long: one timer for many requests.
        self._idle: asyncio.TimerHandle | None = None
        self._asgi = {"version": self.asgi_version, "spec_version": "2.3"}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(
            HEAD_S, self._refuse, 408, "slow_head", "the request's headers took too long to arrive"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        super().connection_lost(exc)

    # -- a request ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_head = True
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer, which is not needed
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_body = True
        self._head_bytes = 0
        self._idle_since = None
        if self._overrun or len(self.pipeline) >= MOST_BEHIND:
            self._overrun = True
            self.cycle.keep_alive = False
            return
        if self._late is not None:
            self._disarm()
        parser = self.parser
        version = parser.get_http_version()
        path, query = _split(self.url)
        text = path.decode("ascii")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": self._asgi,
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": self.root_path + (unquote(text) if "%" in text else text),
            "raw_path": self.root_path.encode("ascii") + path,
            "query_string": query,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
        }
        self.scope = cast(HTTPScope, scope)
        before = self.cycle
        self.cycle = Cycle(
            self.scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            version != "1.0" and parser.should_keep_alive(),
            self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        self._body_came = True
        cycle = self.cycle
        if cycle.response_complete or self._overrun:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._head_bytes = 0
        cycle = self.cycle
        if cycle.response_complete or self._overrun:
            return
        cycle.more_body = False
        cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._overrun:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # to an unsupported protocol: the request is answered normally
        except httptools.HttpParserError:  # without a log line: anybody could cause many
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._in_body:
            self._bound_trailers(len(data))
            return
        if not self._in_head or self._overrun or self.transport.is_closing():
            return
        self._idle_since = None
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            words = f"the request's head is larger than {HEAD_BYTES} bytes"
            self._refuse(431, "head_too_large", words)
        elif self._late is None:
            self._late = self.loop.call_later(
                HEAD_S, self._refuse, 408, "slow_head", "the request's headers took too long to arrive"
            )

    def _bound_trailers(self, size: int) -> None:
        """Close a connection that sends more than HEAD_BYTES of trailers or chunk extensions.

        These are bytes of a body that carry no content.
        """
        self._head_bytes = 0 if self._body_came else self._head_bytes + size
        self._body_came = False
        if self._head_bytes > HEAD_BYTES:
            self.transport.close()

    # -- an idle connection ---------------------------------------------------------------

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:  # further data waits in the socket buffers
            self._idle_since = None
            self._start_asgi_task(*self.pipeline.pop())
            return
        self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self._idle is None:
            self._idle = self.loop.call_later(self.timeout_keep_alive, self._close_idle)

    def _close_idle(self) -> None:
        """Close the connection if it was idle for too long, else check again when it would be."""
        self._idle = None
        if self._idle_since is None or self.transport.is_closing():
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0 or self._has_unread():
            self._idle = self.loop.call_later(max(0.0, left_s), self._close_idle)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """Close an idle connection; one with a request in progress closes with its answer.

        A TLS shutdown would wait for the other end's close_notify, which a client with a kept connection does
        not send, so it is cut short.
        """
        if self._has_unread():
            self.loop.call_soon(self.shutdown)
            return
        super().shutdown()
        if self.scheme == "https" and self.transport.is_closing():
            self.loop.call_later(TLS_GOODBYE_S, self._end_tls)

    def _has_unread(self) -> bool:
        """Tell whether an idle connection's client has sent what was not read yet.

        On a busy machine it may be a request, which would be lost if the connection were closed now.
        """
        busy = self._in_body or (self.cycle is not None and not self.cycle.response_complete)
        found = self.transport.get_extra_info("socket")
        if busy or found is None or self.transport.is_closing():
            return False
        return bool(any(fcntl.ioctl(found.fileno(), termios.FIONREAD, bytes(4))))

    def _end_tls(self) -> None:
        if not self.transport.get_write_buffer_size():  # else the client is still reading the last answer
            self.transport.abort()

    # -- invalid requests -----------------------------------------------------------------

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: int, code: str, words: str) -> None:
        """Answer an incomplete request with an error, and close."""
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
        """Answer data that is not HTTP with a JSON error."""
        self._refuse(400, "malformed_request", msg)


def _split(url: bytes) -> tuple[bytes, bytes]:
    """Return path and query of a request's target."""
    if url[:1] == b"/" and url[:2] != b"//" and b"#" not in url:
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)
    return parsed.path, parsed.query or b""
