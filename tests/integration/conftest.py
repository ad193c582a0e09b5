# SPDX-License-Identifier: Apache-2.0
"""Fixtures of tests that run real workers, and what stands for systemd."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuinfer import Client
from gpuinfer.settings import Settings
from tests.apis import Api, HandWorker
from tests.brokers import OurRedis, our_redis
from tests.conftest import RedisFactory
from tests.services import RedisServer
from tests.workers import Workers


class Systemd:
    """The receiving end of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        self._unread: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(60)

    def until(self, start: str) -> str:
        """Wait for a note that begins so, and return it; all that comes is kept in ``notes``."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if not self._unread:
                self._unread = self._socket.recv(4096).decode().split("\n")
            note = self._unread.pop(0)
            self.notes.append(note)
            if note.startswith(start):
                return note
        raise AssertionError(f"no note {start}...; there were {self.notes}")

    def rest(self) -> list[str]:
        """Return what has come by now and nobody has asked for."""
        found, self._unread = self._unread, []
        while select.select([self._socket], [], [], 0)[0]:
            found += self._socket.recv(4096).decode().split("\n")
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """What is started from now on reports here, with a watchdog of 2 s."""
    listening = Systemd(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    yield listening
    listening.close()


@pytest.fixture
def redis_server(request: pytest.FixtureRequest, redis_factory: RedisFactory) -> Iterator[RedisServer]:
    """This test's Redis: an empty one; with the mark our_redis our own with its users.

    What a test asks ours for and is refused, it takes from the log (``denied()``).
    """
    if request.node.get_closest_marker("our_redis") is None:
        yield redis_factory()
        return
    with our_redis() as server:
        yield server


@pytest.fixture
def workers(redis_server: RedisServer, tmp_path: Path) -> Iterator[Workers]:
    """Start workers on this test's Redis."""
    started = Workers(redis_server, tmp_path)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture
def settings(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Settings:
    """Settings that point at this test's Redis."""
    return settings_for(redis_server)


@pytest.fixture
def client(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Iterator[Client]:
    """A client on this test's Redis; on our own with the rights of the API."""
    login = redis_server.login("api") if isinstance(redis_server, OurRedis) else {}
    with Client(settings_for(redis_server, broker=login)) as opened:
        yield opened


@pytest.fixture
def api(redis_server: RedisServer, tmp_path: Path) -> Iterator[Api]:
    """The API on this test's Redis."""
    with Api(redis_server, tmp_path) as started:
        yield started


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[HandWorker]:
    """Somebody who ends tasks."""
    with redis_server.client() as client:
        yield HandWorker(client)
