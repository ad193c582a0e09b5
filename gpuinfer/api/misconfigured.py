# SPDX-License-Identifier: Apache-2.0
"""The API while its settings are wrong: it answers every request with a 503 that says what is wrong.

If the API exited, systemd would restart it until the start limit, then close its socket, too. So with sockets
from systemd it stays, rereads the settings every few seconds, and serves once they are right. A partly
written file may be valid, so the file must be unchanged between two reads, and not empty. Details are given
over the Unix socket, and over loopback while there are no keys; other clients only learn that the settings
are wrong.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, Final, TypeVar

import orjson
from sdnotify import SystemdNotifier

from gpuinfer.api.network import Network
from gpuinfer.errors import ConfigError, GpuinferError, NotReady
from gpuinfer.keys.writing import names
from gpuinfer.log import get_logger
from gpuinfer.settings import ApiSettings, Loaded, variable
from gpuinfer.sources import file_state, read_text

log = get_logger(__name__)

#: Seconds between two reads of the settings, and the value of Retry-After.
LOOK_S: Final = 2
#: Seconds for the head of a request.
HEAD_S: Final = 5.0
#: Seconds for a client to send the rest, which is discarded, and to read the answer.
REST_S: Final = 60.0
#: Maximum connections; a new one closes the oldest.
MOST_CONNECTIONS: Final = 512
_MOST_HEADERS_BYTES: Final = 65_536
#: A line of a settings file, valid or not, that may set api.keys_dir and is not a comment.
_NAMES_KEYS_DIR: Final = re.compile(r"^[^#\n]*keys_dir", re.MULTILINE)
T = TypeVar("T")


def wait_for(
    prepare: Callable[[], T],
    listeners: Sequence[socket.socket],
    file: Path,
    keys_dir: Callable[[], Path | None],
) -> T | None:
    """Return the result of ``prepare``; while it raises ConfigError, answer 503.

    ``file``: the settings file that ``prepare`` reads. ``keys_dir`` returns the folder of keys, or None if
    unknown. Returns None on SIGTERM or SIGINT. The listeners stay open.
    """
    try:
        return prepare()
    except ConfigError as exc:
        return asyncio.run(_Misconfigured(exc, file, keys_dir).until_right(prepare, listeners))


def keys_dir(loaded: Loaded, file: Path) -> Path | None:
    """Return the folder of keys, even while other settings are wrong; None if unknown."""
    try:
        return loaded.only("api").api.keys_dir
    except ConfigError:
        named = os.environ.get(variable("api", "keys_dir"))
        if named:
            return Path(named)
    try:
        text = read_text(file)
    except ConfigError:
        return None
    return None if _NAMES_KEYS_DIR.search(text) else ApiSettings().keys_dir


def answer(error: GpuinferError, *, body: bool = True) -> bytes:
    """Return a complete HTTP/1.1 answer that closes its connection; without ``body`` for HEAD."""
    text = orjson.dumps({"error": error.to_dict()}, option=orjson.OPT_APPEND_NEWLINE)
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        f"content-length: {len(text)}\r\nretry-after: {LOOK_S}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + (text if body else b"")


class _Misconfigured:
    def __init__(self, error: ConfigError, file: Path, keys_dir: Callable[[], Path | None]) -> None:
        self._error, self._file = error, file
        self._find_keys_dir = keys_dir
        self._keys_dir = keys_dir()
        self._network = Network(ApiSettings(), socket.gethostname())
        self._notifier = SystemdNotifier()
        #: The timeouts of the open connections, the oldest first.
        self._open: dict[asyncio.Timeout, None] = {}

    async def until_right(self, prepare: Callable[[], T], listeners: Sequence[socket.socket]) -> T | None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (SIGINT, SIGTERM):
            loop.add_signal_handler(number, stop.set)
        self._tell(self._error)
        # A server closes its sockets, so give it duplicates.
        servers = [
            await asyncio.start_server(self._connection, sock=one.dup(), limit=_MOST_HEADERS_BYTES)
            for one in listeners
        ]
        stopping, feeding = loop.create_task(stop.wait()), loop.create_task(self._feed())
        before: object = ()
        try:
            while True:
                await asyncio.wait((stopping,), timeout=LOOK_S)
                if stopping.done():
                    return None
                seen = file_state(self._file)
                # In a thread: it asks Redis, which may not answer soon.
                look = loop.create_task(asyncio.to_thread(self._look, prepare))
                await asyncio.wait((stopping, look), return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    return None
                try:
                    found = look.result()
                except ConfigError as exc:
                    if str(exc) != str(self._error):
                        self._tell(exc)
                else:
                    if before == seen == file_state(self._file):
                        log.info("settings_right", pid=os.getpid())
                        return found
                before = seen
        finally:
            feeding.cancel()
            stopping.cancel()
            for server in servers:
                server.close()
            for number in (SIGINT, SIGTERM):
                loop.remove_signal_handler(number)

    def _look(self, prepare: Callable[[], T]) -> T:
        """Read the settings, in a thread. Raises ConfigError."""
        self._keys_dir = self._find_keys_dir()
        _check_written(self._file)
        return prepare()

    async def _feed(self) -> None:
        """Feed systemd's watchdog while requests are answered."""
        while True:
            self._notifier.notify("WATCHDOG=1")
            await asyncio.sleep(LOOK_S)

    def _tell(self, error: ConfigError) -> None:
        self._error = error
        log.error(
            "settings_wrong",
            error=str(error),
            hint="requests are answered with 503 until the settings are corrected",
        )
        self._notifier.notify(f"READY=1\nSTATUS=answers 503: {' '.join(str(error).split())}")

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(HEAD_S) as limit:
                self._make_place()
                self._open[limit] = None
                try:
                    await self._answer(reader, writer, limit)
                finally:
                    self._open.pop(limit, None)
        writer.close()

    def _make_place(self) -> None:
        """Close the oldest connection if there are too many."""
        if len(self._open) >= MOST_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            if not oldest.expired():
                oldest.reschedule(0)

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: asyncio.Timeout
    ) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            head = b""
        if limit in self._open and not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time() + REST_S)
        error: GpuinferError = self._error
        if not self._may_know(head, writer):
            error = NotReady("the server's settings are wrong; run gpuinfer config check on its host")
        writer.write(answer(error, body=not head.startswith(b"HEAD ")))
        await writer.drain()
        writer.write_eof()
        # Closing with unread data resets the connection, and the client may lose its answer.
        while await reader.read(_MOST_HEADERS_BYTES):
            pass

    def _may_know(self, head: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether a request came over the Unix socket, or over loopback while that needs no key.

        Requests through a local proxy that adds no headers look like loopback; with keys they are refused.
        """
        scope = _scope(head, writer)
        arrival = self._network.arrival(scope)
        try:
            self._network.check(scope, arrival)
        except GpuinferError:
            return False
        return bool(head) and (arrival == "unix" or (arrival == "loopback" and not _has_keys(self._keys_dir)))


def _check_written(path: Path) -> None:
    """Raise ConfigError for an empty file: editors and ``>`` truncate a file before they write it."""
    try:
        empty = path.stat().st_size == 0
    except OSError:
        return
    if empty:
        raise ConfigError("is empty, perhaps still being written; restart the API to accept it", str(path))


def _scope(head: bytes, writer: asyncio.StreamWriter) -> dict[str, Any]:
    """Return an ASGI scope with a request's connection and headers."""
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    peer = writer.get_extra_info("peername")
    by_tcp = isinstance(peer, tuple)
    return {
        "client": peer[:2] if by_tcp else None,
        "server": ("", 0 if by_tcp else None),
        "headers": [(name.strip().lower(), value.strip()) for name, _, value in pairs],
    }


def _has_keys(folder: Path | None) -> bool:
    """Whether keys are in use; True if unknown."""
    try:
        return folder is None or bool(names(folder))
    except GpuinferError:
        return True
