# SPDX-License-Identifier: Apache-2.0
"""Several processes on one socket, and their parent (``api.processes``).

The parent opens the socket and forks; it serves no requests. It sends READY to systemd once all children
serve, writes the request log for all, restarts a child that crashes or hangs, and passes SIGTERM on. If the
parent dies, its children stop in order. The socket stays open during restarts, so pending connections wait in
it.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from signal import (
    SIG_DFL,
    SIGABRT,
    SIGCHLD,
    SIGCONT,
    SIGINT,
    SIGKILL,
    SIGTERM,
    Signals,
    set_wakeup_fd,
    signal,
)
from typing import Any, NoReturn

import orjson
from sdnotify import SystemdNotifier

from gpuinfer.api.front import Front
from gpuinfer.api.relay import MESSAGE_BYTES, Link, Relay
from gpuinfer.api.request_log import RequestLog
from gpuinfer.api.server import Server, address
from gpuinfer.api.tls import Certificate
from gpuinfer.errors import ProcessesFailed
from gpuinfer.log import flush, get_logger
from gpuinfer.settings import Settings

log = get_logger(__name__)

#: Seconds before a crashed process is restarted; doubled with each crash in a row.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
#: After this many seconds of serving, a crash does not count as "in a row".
SOUND_S = 60.0
#: Seconds for processes to stop before they are killed.
END_S = 20.0

Serve = Callable[[Link], None]


def pause_after(crashes: int) -> float:
    """Return the seconds to wait after ``crashes`` crashes in a row, at least 1."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(crashes - 1, 30))


class _Place:
    """A slot for one process, which may be restarted."""

    def __init__(self) -> None:
        self.pid = 0
        self.link: socket.socket | None = None
        self.ready = False
        #: Whether it hung and was sent SIGABRT.
        self.warned = False
        self.began = self.heard = 0.0
        self.crashes = 0
        #: When to restart it.
        self.due = 0.0


class Supervisor:
    """Runs ``count`` processes with ``serve`` in each. Use it in a process without threads."""

    def __init__(
        self,
        count: int,
        serve: Serve,
        listeners: Sequence[socket.socket],
        requests: RequestLog,
        certificate: Certificate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serve = serve
        self._listeners = listeners
        self._requests = requests
        #: Renewed here, too, so that a restarted process has the last valid certificate.
        self._certificate = certificate
        self._clock = clock
        self._places = [_Place() for _ in range(count)]
        self._selector = selectors.DefaultSelector()
        self._notifier = SystemdNotifier()
        self._stopping = self._told = False
        watchdog_us = int(os.environ.get("WATCHDOG_USEC") or 0)
        #: Seconds of silence after which a process counts as hung; 0: no limit.
        self._patience_s = watchdog_us / 1e6

    def run(self, where: str) -> None:
        """Serve until SIGTERM or SIGINT. Raises ProcessesFailed if one cannot start the first time."""
        wake, woken = socket.socketpair()
        for one in (wake, woken):
            one.setblocking(False)
        set_wakeup_fd(woken.fileno())
        for number in (SIGTERM, SIGINT):
            signal(number, self._stop)
        signal(SIGCHLD, lambda *_: None)
        self._selector.register(wake, selectors.EVENT_READ)
        try:
            for place in self._places:
                self._start(place)
            while not self._stopping:
                self._turn(wake, where)
            self._end(wake)
        finally:
            set_wakeup_fd(-1)
            for place in self._places:
                if place.pid:
                    os.kill(place.pid, SIGKILL)
                    os.waitpid(place.pid, 0)
            self._requests.close()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _turn(self, wake: socket.socket, where: str) -> None:
        """Handle messages for half a second; restart ended processes."""
        self._hear(wake)
        self._reap()
        self._requests.tick()
        if self._certificate is not None:
            self._certificate.tick()
        self._notifier.notify("WATCHDOG=1")
        now = self._clock()
        for place in self._places:
            if not place.pid and now >= place.due and not self._stopping:
                self._start(place)
            elif place.pid and self._patience_s and now - place.heard > self._patience_s:
                self._end_hung(place, now)
        ready = sum(place.ready for place in self._places)
        if ready == len(self._places) and not self._told:
            self._told = True
            log.info("listening", address=where, pid=os.getpid(), processes=ready)
            self._notifier.notify(f"READY=1\nSTATUS={ready} processes listening on {where}")

    def _end_hung(self, place: _Place, now: float) -> None:
        """Send SIGABRT to a hung process, which logs a traceback; the next time SIGKILL."""
        log.error("process_hangs", pid=place.pid, silent_s=round(now - place.heard, 1))
        os.kill(place.pid, SIGKILL if place.warned else SIGABRT)
        os.kill(place.pid, SIGCONT)  # as systemd does: a stopped process handles no signals
        place.warned, place.heard = True, now

    def _hear(self, wake: socket.socket) -> None:
        for key, _ in self._selector.select(0.5):
            if key.fileobj is wake:
                with suppress(BlockingIOError):
                    wake.recv(4096)
            else:
                self._take(key.data)

    def _take(self, place: _Place) -> None:
        if place.link is None:
            return
        try:
            data = place.link.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._forget(place)
            return
        message: dict[str, Any] = orjson.loads(data)
        place.heard = self._clock()
        place.ready = place.ready or bool(message.get("ready"))
        if "requests" in message:
            self._requests.add_told(message["requests"])

    def _forget(self, place: _Place) -> None:
        if place.link is not None:
            self._selector.unregister(place.link)
            place.link.close()
            place.link = None

    def _start(self, place: _Place) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            self._become_child(theirs, ours)
        theirs.close()
        ours.setblocking(False)
        place.pid, place.link, place.ready, place.warned = pid, ours, False, False
        place.began = place.heard = self._clock()
        self._selector.register(ours, selectors.EVENT_READ, place)

    def _become_child(self, link: socket.socket, ours: socket.socket) -> NoReturn:
        status = 70
        try:
            set_wakeup_fd(-1)
            for number in (SIGTERM, SIGINT, SIGCHLD):
                signal(number, SIG_DFL)
            self._selector.close()
            for place in self._places:
                if place.link is not None:
                    place.link.close()
            ours.close()
            if self._certificate is not None:
                self._certificate.tell = False
            self._serve(Link(link))
            status = 0
        except BaseException:
            log.exception("process_failed", pid=os.getpid())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            flush()
            os._exit(status)

    def _reap(self) -> None:
        """Reap ended processes. Raises ProcessesFailed for one that never served."""
        for place in self._places:
            pid, status = os.waitpid(place.pid, os.WNOHANG) if place.pid else (0, 0)
            if not pid:
                continue
            while place.link is not None:  # read its last messages
                self._take(place)
            served, place.pid = place.ready, 0
            place.ready = False
            if self._stopping:
                continue
            code, lasted = os.waitstatus_to_exitcode(status), self._clock() - place.began
            how = f"signal {Signals(-code).name}" if code < 0 else f"status {code}"
            if not (served or self._told):
                raise ProcessesFailed(f"a process of the API ended with {how} before it was ready")
            place.crashes = 1 if lasted > SOUND_S else place.crashes + 1
            pause = pause_after(place.crashes)
            place.due = self._clock() + pause
            log.error(
                "process_crashed", pid=pid, ended_with=how, served_s=round(lasted, 1), restart_in_s=pause
            )

    def _end(self, wake: socket.socket) -> None:
        """Stop all processes in order; kill those that do not stop in time."""
        self._notifier.notify("STOPPING=1")
        for listener in self._listeners:
            listener.close()
        for place in self._places:
            if place.pid:
                os.kill(place.pid, SIGTERM)
        until = self._clock() + END_S
        while any(place.pid for place in self._places) and self._clock() < until:
            self._hear(wake)
            self._reap()
        log.info("stopped", killed=sum(bool(place.pid) for place in self._places))


def supervise(
    settings: Settings,
    listeners: Sequence[socket.socket],
    certificate: Certificate | None = None,
    metrics: Sequence[socket.socket] = (),
) -> None:
    """Serve with ``api.processes`` processes until SIGTERM or SIGINT. Raises ProcessesFailed."""

    def serve(link: Link) -> None:
        front = Front(settings, Relay(link, settings.log.requests), metrics)
        Server(front, front.shared, link, certificate).run(sockets=list(listeners))

    requests = RequestLog(settings.log.requests)
    keeper = Supervisor(settings.api.processes, serve, listeners, requests, certificate)
    keeper.run(", ".join(address(one, certificate) for one in listeners))
