# SPDX-License-Identifier: Apache-2.0
"""The front while its settings are wrong: each request is a 503 that says what is wrong.

systemd would start a front that ends at once again and again, and then give up its socket, too. So a front
that was handed its sockets stays, reads the settings every few seconds, and serves once they are right. The
beginning of a file that is being written may be valid, so the file must be unchanged over two looks, and not
empty. What is wrong is told by the Unix socket, and by loopback while there is no key; everybody else learns
that something is.
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

#: Between two looks at the settings; also what Retry-After says.
LOOK_S: Final = 2
#: What a connection has for the head of its request.
HEAD_S: Final = 5.0
#: What it has then to send the rest, which nobody reads, and to read the answer.
REST_S: Final = 60.0
#: The most connections; one more ends the oldest.
MOST_CONNECTIONS: Final = 512
_MOST_HEADERS_BYTES: Final = 65_536
#: A line of a settings file, valid or not, that is no comment and may set api.keys_dir.
_NAMES_KEYS_DIR: Final = re.compile(r"^[^#\n]*keys_dir", re.MULTILINE)
T = TypeVar("T")


def wait_for(
    prepare: Callable[[], T],
    listeners: Sequence[socket.socket],
    file: Path,
    keys_dir: Callable[[], Path | None],
) -> T | None:
    """Return what ``prepare`` returns; while it raises ConfigError, answer 503.

    ``file``: the settings file, which ``prepare`` reads. ``keys_dir`` returns the folder of keys, None where
    it is not known. None: SIGTERM or SIGINT came first. The listeners stay open.
    """
    try:
        return prepare()
    except ConfigError as exc:
        return asyncio.run(_Misconfigured(exc, file, keys_dir).until_right(prepare, listeners))


def keys_dir(loaded: Loaded, file: Path) -> Path | None:
    """Return the folder of keys, even while other settings are wrong; None where it is not known."""
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
    """Return a whole HTTP/1.1 answer that closes its connection; without its ``body`` for HEAD."""
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
        #: The limits of the open connections, the oldest first.
        self._open: dict[asyncio.Timeout, None] = {}

    async def until_right(self, prepare: Callable[[], T], listeners: Sequence[socket.socket]) -> T | None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (SIGINT, SIGTERM):
            loop.add_signal_handler(number, stop.set)
        self._tell(self._error)
        # A server closes what it listens on, so each has a descriptor of its own.
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
                # It asks Redis, which may not answer, or not soon.
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
        """Feed systemd's watchdog for as long as requests are answered."""
        while True:
            self._notifier.notify("WATCHDOG=1")
            await asyncio.sleep(LOOK_S)

    def _tell(self, error: ConfigError) -> None:
        self._error = error
        log.error("settings_wrong", error=str(error), hint="requests are answered 503 until they are right")
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
        """End the oldest connection where there are too many."""
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
            error = NotReady("its settings are wrong; on its host, gpuinfer config check says what")
        writer.write(answer(error, body=not head.startswith(b"HEAD ")))
        await writer.drain()
        writer.write_eof()
        # What is unread when a connection is closed resets it, and may cost the client its answer.
        while await reader.read(_MOST_HEADERS_BYTES):
            pass

    def _may_know(self, head: bytes, writer: asyncio.StreamWriter) -> bool:
        """Tell whether a request came by the Unix socket, or by loopback while that needs no key.

        A proxy on this host that adds no header asks by loopback for strangers; by keys they are kept out.
        """
        scope = _scope(head, writer)
        arrival = self._network.arrival(scope)
        try:
            self._network.check(scope, arrival)
        except GpuinferError:
            return False
        return bool(head) and (arrival == "unix" or (arrival == "loopback" and not _has_keys(self._keys_dir)))


def _check_written(path: Path) -> None:
    """Raise ConfigError for an empty file: editors and ``>`` truncate a file, then write it."""
    try:
        empty = path.stat().st_size == 0
    except OSError:
        return
    if empty:
        raise ConfigError("is empty, as a file that is being written; a restart takes it as it is", str(path))


def _scope(head: bytes, writer: asyncio.StreamWriter) -> dict[str, Any]:
    """Return what ASGI would say of a request's connection and headers."""
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    peer = writer.get_extra_info("peername")
    by_tcp = isinstance(peer, tuple)
    return {
        "client": peer[:2] if by_tcp else None,
        "server": ("", 0 if by_tcp else None),
        "headers": [(name.strip().lower(), value.strip()) for name, _, value in pairs],
    }


def _has_keys(folder: Path | None) -> bool:
    """Tell whether keys are in use. What is not known counts as a key."""
    try:
        return folder is None or bool(names(folder))
    except GpuinferError:
        return True
