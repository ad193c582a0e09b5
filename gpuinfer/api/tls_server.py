# SPDX-License-Identifier: Apache-2.0
"""Accepts TLS connections on a socket, and answers plain HTTP with a helpful error.

asyncio's own server starts TLS at once and drops anything else without an answer. So the first byte is peeked
at first: that of a TLS handshake is 22.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

import orjson

from gpuinfer.log import get_logger

log = get_logger(__name__)

#: Seconds for the first byte, and for the handshake.
HELLO_S = HANDSHAKE_S = 10.0
#: Maximum connections accepted per turn of the event loop.
_AT_ONCE = 64
#: Seconds to stop accepting when the process is out of descriptors or memory.
_PAUSE_S = 1.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_HANDSHAKE = b"\x16"
_WORDS = "this port uses TLS: use https://"
_BODY = orjson.dumps({"error": {"code": "tls_required", "message": _WORDS}}) + b"\n"
_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n" % len(_BODY)
) + _BODY


class TlsServer:
    """One listening socket, with the methods of an asyncio server that uvicorn calls.

    ``made`` creates a connection's protocol; ``plain`` is called for each plain HTTP connection.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        made: Callable[[], asyncio.Protocol],
        plain: Callable[[], None],
    ) -> None:
        self._listener = listener
        self._context = context
        self._made = made
        self._plain = plain
        self._loop = asyncio.get_running_loop()
        self._greeted: set[asyncio.Task[None]] = set()
        self._closed = False
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    @property
    def busy(self) -> bool:
        """Whether any connections are before the end of their handshake."""
        return bool(self._greeted)

    def close(self) -> None:
        """Stop accepting; accepted connections continue."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Close connections before the end of their handshake."""
        for task in self._greeted:
            task.cancel()
        if self._greeted:
            await asyncio.wait(self._greeted)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in _NO_ROOM:
                    raise
                log.error("cannot_accept", reason=exc.strerror)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._greet(connection))
            self._greeted.add(task)
            task.add_done_callback(self._greeted.discard)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)

    async def _greet(self, connection: socket.socket) -> None:
        """Start TLS if the client does; at the end the connection is closed or has its protocol."""
        try:
            first = await asyncio.wait_for(self._first_byte(connection), HELLO_S)
            if first == _HANDSHAKE:
                await self._loop.connect_accepted_socket(
                    self._made, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_S
                )
                return
            if first.isalpha():
                self._plain()
                await self._refuse(connection)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise
        except (OSError, TimeoutError) as exc:  # SSLError is an OSError
            log.debug("handshake_failed", reason=str(exc))
            connection.close()

    async def _first_byte(self, connection: socket.socket) -> bytes:
        """Peek at the first byte; empty: the client has closed."""
        ready = asyncio.Event()
        self._loop.add_reader(connection, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(connection)
        return connection.recv(1, socket.MSG_PEEK)

    async def _refuse(self, connection: socket.socket) -> None:
        """Answer plain HTTP; read on for a moment, as closing with unread data could lose the answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._loop.sock_sendall(connection, _ANSWER)
                connection.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(connection, 65536):
                    continue
