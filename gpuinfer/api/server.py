# SPDX-License-Identifier: Apache-2.0
"""The server: uvicorn on our own sockets, with a graceful shutdown.

Order of the shutdown, so that no request is lost: close the listener, answer waiting callers with their
task's state, send ``Connection: close`` with answers for a moment, then close idle connections.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from typing import Any

import uvicorn
from sdnotify import SystemdNotifier
from starlette.types import ASGIApp

from gpuinfer.api.protocol import Protocol
from gpuinfer.api.relay import Link
from gpuinfer.api.shared import Shared
from gpuinfer.api.tls import Certificate
from gpuinfer.api.tls_server import TlsServer
from gpuinfer.errors import AddressUnavailable
from gpuinfer.log import get_logger

log = get_logger(__name__)

BACKLOG = 2048
#: Requests create hundreds of objects but few cycles; Python's default of 700 would collect every few
#: requests.
GC_THRESHOLDS = (20_000, 20, 100)
#: The first descriptor passed by systemd.
_FIRST_FD = 3
#: Attempts to find a port that is free on all addresses.
_FREE_PORTS = 20
#: Seconds for clients on keep-alive connections to see ``Connection: close``.
GOODBYE_S = 0.3
#: Seconds after the signal when unfinished requests are cut off.
GRACE_S = 10


def listen(host: str, port: int) -> list[socket.socket]:
    """Return listening TCP sockets, one for each address of the name. Raises AddressUnavailable.

    Port 0: one free port for all. Addresses that this machine does not have are skipped, unless it has none
    of them.
    """
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        for _ in range(_FREE_PORTS):
            with suppress(_PortTaken):
                return [without_delay(one) for one in _bind_all(addresses)]
    except OSError as exc:
        raise AddressUnavailable(f"cannot listen on {where}: {_reason(exc)}", "api.port") from exc
    raise AddressUnavailable(f"cannot listen on {where}: no port is free on all its addresses", "api.port")


class _PortTaken(Exception):
    """Raised if a port is free on one address but not on another."""


def _bind_all(addresses: Sequence[tuple[socket.AddressFamily, tuple[Any, ...]]]) -> list[socket.socket]:
    """Listen on all addresses. Raises OSError, and _PortTaken: try another port."""
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, (name, port, *rest) in addresses:
            given = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_bind(family, (name, given, *rest), alone=len(addresses) == 1))
            except OSError as exc:
                if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    absent = exc
                elif exc.errno == errno.EADDRINUSE and given != port:
                    raise _PortTaken from exc
                else:
                    raise
        if not sockets and absent is not None:
            raise absent
    except BaseException:
        for one in sockets:
            one.close()
        raise
    return sockets


def _bind(family: socket.AddressFamily, address: tuple[Any, ...], *, alone: bool) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:  # else :: includes 0.0.0.0, which has its own socket
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except BaseException:
        found.close()
        raise
    return found


def listen_unix(path: Path) -> socket.socket:
    """Return a listening Unix socket (mode 0660); replaces a stale one. Raises AddressUnavailable."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
        found.bind(str(path))
        path.chmod(0o660)
        found.listen(BACKLOG)
    except OSError as exc:
        found.close()
        raise AddressUnavailable(f"cannot listen on {path}: {_reason(exc)}", "--socket") from exc
    return found


def _remove_dead(path: Path) -> None:
    """Remove a stale socket; bind refuses a live one or another kind of file."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


def inherited(fd: int) -> list[socket.socket]:
    """Return inherited listening sockets: all from systemd, or this one.

    Raises AddressUnavailable.
    """
    count = 1
    if os.environ.get("LISTEN_PID") == str(os.getpid()):  # sd_listen_fds(3): from 3 on
        count = max(1, _FIRST_FD + int(os.environ.get("LISTEN_FDS") or 0) - fd)
    found: list[socket.socket] = []
    try:
        for number in range(fd, fd + count):
            found.append(_inherited(number))
    except AddressUnavailable:
        for one in found:
            one.close()
        raise
    return found


def _inherited(fd: int) -> socket.socket:
    try:
        found = socket.socket(fileno=fd)
        if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.detach()
            raise OSError("not a listening socket")
    except OSError as exc:
        raise AddressUnavailable(f"cannot listen on descriptor {fd}: {_reason(exc)}", "--fd") from exc
    return without_delay(found)


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc)


def without_delay(listener: socket.socket) -> socket.socket:
    """Set TCP_NODELAY, inherited by accepted connections, so that answers do not wait for an ACK."""
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def speaks_tls(listener: socket.socket, certificate: Certificate | None) -> bool:
    """Whether a socket uses TLS: all TCP sockets do, if there is a certificate."""
    return certificate is not None and listener.family in (socket.AF_INET, socket.AF_INET6)


def address(listener: socket.socket, certificate: Certificate | None = None) -> str:
    """Return where a socket listens, as a URL."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
    scheme = "https" if speaks_tls(listener, certificate) else "http"
    return f"{scheme}://{host}:{name[1]}"


def settle_memory() -> None:
    """Exclude all current objects from garbage collection: they live as long as the process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class Server(uvicorn.Server):
    """uvicorn's server, with notifications to systemd, our log, and exit status 0."""

    def __init__(
        self,
        app: ASGIApp,
        shared: Shared,
        parent: Link | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=shared.settings.api.keep_alive_s,
                timeout_graceful_shutdown=GRACE_S,
                backlog=BACKLOG,
            )
        )
        self._shared = shared
        self._requests = shared.requests
        self._parent = parent
        self._certificate = certificate
        self._tls: list[TlsServer] = []
        #: Receives notifications: systemd, or the parent of several processes.
        self._notifier: SystemdNotifier | Link = SystemdNotifier() if parent is None else parent
        #: Ticks between two watchdog notifications: a quarter of systemd's timeout; 0: no watchdog.
        watchdog_us = int(os.environ.get("WATCHDOG_USEC") or 0)
        self._feed_every = max(1, watchdog_us // 400_000) if watchdog_us else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        found = sockets or []
        await super().startup(sockets=[one for one in found if not speaks_tls(one, self._certificate)])
        if self._certificate is not None:
            self._tls = [
                TlsServer(one, self._certificate.context, self._connection, self._plain)
                for one in found
                if speaks_tls(one, self._certificate)
            ]
        settle_memory()
        urls = [address(one, self._certificate) for one in found]
        if self._parent is None:
            log.info("listening", address=", ".join(urls), pid=os.getpid())
        else:
            asyncio.get_running_loop().add_reader(self._parent.fileno(), self._orphaned)
        self._notifier.notify(f"READY=1\nSTATUS=listening on {', '.join(urls)}")

    def _connection(self) -> asyncio.Protocol:
        """Create the protocol of a TLS connection, as uvicorn does for others."""
        return Protocol(self.config, self.server_state, self.lifespan.state)

    def _plain(self) -> None:
        """Count a plain HTTP request on a TLS socket."""
        self._requests.add("request", 400, 0.0, {"status": 400, "code": "tls_required"})

    def _orphaned(self) -> None:
        """Stop in order: the descriptor is readable only if the parent is dead."""
        if self._parent is not None:
            asyncio.get_running_loop().remove_reader(self._parent.fileno())
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Feed systemd's watchdog and the request log (called ten times a second)."""
        if counter % 10 == 0:
            self._requests.tick()
            if self._certificate is not None:
                self._certificate.tick()
        if self._feed_every and counter % self._feed_every == 0:
            self._notifier.notify("WATCHDOG=1")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._notifier.notify("STOPPING=1")
        log.info("stopping", connections=len(self.server_state.connections))
        for server in self.servers:
            server.close()
        for secured in self._tls:
            secured.close()
        self._shared.stop()
        if self.server_state.connections or any(secured.busy for secured in self._tls):
            await asyncio.sleep(GOODBYE_S)
        for secured in self._tls:
            await secured.wait_closed()
        await super().shutdown(sockets=sockets)
        self._requests.close()
        if self._parent is None:
            log.info("stopped")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT; uvicorn's own handler would raise the signal again afterwards."""
        before = {number: signal(number, self.handle_exit) for number in (SIGINT, SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal(number, handler)
