# SPDX-License-Identifier: Apache-2.0
"""Accepts TLS connections on a socket, and tells who speaks plain HTTP there what to do instead.

asyncio's own server starts TLS at once, and what is no TLS is cut off without a word. So the first byte is
looked at before: a handshake's is 22.
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

#: Seconds in which a connection must have sent its first byte, and then have done its handshake.
HELLO_S = HANDSHAKE_S = 10.0
#: Connections that are accepted in one turn of the event loop.
_AT_ONCE = 64
#: Seconds without accepting when the process has no room for another connection.
_PAUSE_S = 1.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_HANDSHAKE = b"\x16"
_WORDS = "this port speaks TLS: use https:// here"
_BODY = orjson.dumps({"error": {"code": "tls_required", "message": _WORDS}}) + b"\n"
_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n" % len(_BODY)
) + _BODY


class TlsServer:
    """One listening socket. It has the methods that uvicorn calls of an asyncio server.

    ``made`` makes a connection's protocol; ``plain`` is called for each that spoke plain HTTP.
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
        """Tell whether connections are at their beginning."""
        return bool(self._greeted)

    def close(self) -> None:
        """Accept no more; what has been accepted goes on."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Cut off the connections that are still at their beginning."""
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
        """Begin TLS with who wants it; whatever happens, the connection is closed or has its protocol."""
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
        """Return the first byte without taking it; empty: the other end has closed."""
        ready = asyncio.Event()
        self._loop.add_reader(connection, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(connection)
        return connection.recv(1, socket.MSG_PEEK)

    async def _refuse(self, connection: socket.socket) -> None:
        """Answer plain HTTP, and read on for a moment: closing on unread data would lose the answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._loop.sock_sendall(connection, _ANSWER)
                connection.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(connection, 65536):
                    continue
