# SPDX-License-Identifier: Apache-2.0
"""The front with wrong settings: when it takes them for right, and whom it tells what is wrong."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sdnotify import SystemdNotifier

from gpuinfer.api import cli, misconfigured
from gpuinfer.errors import ConfigError
from gpuinfer.queue import connection
from gpuinfer.settings import BrokerSettings, Settings

pytestmark = pytest.mark.unit

WRONG = "[api\n"
Front = misconfigured._Misconfigured
T = TypeVar("T")


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misconfigured, "LOOK_S", 0.001)


def served(
    talk: Callable[[Front, socket.socket], Coroutine[Any, Any, T]],
    keys_dir: Path | None = None,
    listener: socket.socket | None = None,
) -> T:
    """Talk to a front whose settings stay wrong, for 60 s at most; return what came of it."""

    def prepare() -> None:
        raise ConfigError("SECRET")

    async def run(listening: socket.socket) -> T:
        front = Front(ConfigError("SECRET"), Path("/nonexistent/gpuinfer.toml"), lambda: keys_dir)
        serving = asyncio.ensure_future(front.until_right(prepare, [listening]))
        try:
            return await asyncio.wait_for(talk(front, listening), 60)
        finally:
            serving.cancel()

    with listener or socket.create_server(("127.0.0.1", 0)) as listening:
        return asyncio.run(run(listening))


def read(file: Path) -> str:
    text = file.read_text()
    if text == WRONG:
        raise ConfigError("is not valid TOML", str(file))
    return text


def test_a_half_written_file_is_not_taken(tmp_path: Path) -> None:
    """What was written between two looks, or while it was read, is read again, though it was right."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text(WRONG)
    coming = ["[api]\n", "[api]\ntls_cert =", "[api]\ntls_cert = 'a'\n"]
    seen: list[str] = []

    def prepare() -> str:
        if seen and coming:  # it is written on while it is read
            file.write_text(coming.pop(0))
        seen.append(file.read_text())
        return read(file)

    assert misconfigured.wait_for(prepare, [], file, lambda: None) == "[api]\ntls_cert = 'a'\n"
    assert seen[1:4] == ["[api]\n", "[api]\ntls_cert =", "[api]\ntls_cert = 'a'\n"]


def test_an_emptied_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor empties a file, then writes it; nobody knows how long that takes."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text(WRONG)
    told: list[str] = []

    def edit(text: str) -> None:
        told.append(text)
        file.write_text("" if len(told) == 1 else "[api]\nport = 1\n")

    monkeypatch.setattr(misconfigured.log, "error", lambda _event, *, error, hint: edit(error))
    assert misconfigured.wait_for(lambda: read(file), [], file, lambda: None) == "[api]\nport = 1\n"
    assert ["is empty" in text for text in told] == [False, True]


def test_a_slow_look_keeps_no_request_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that does not answer holds up the look alone: requests are answered, the watchdog is fed."""
    blocked, answered = threading.Event(), threading.Event()
    told: list[str] = []
    monkeypatch.setattr(SystemdNotifier, "notify", lambda _, state: told.append(state))

    def prepare() -> str:
        blocked.set()
        assert answered.wait(60)
        return "right"

    async def serve(listener: socket.socket) -> str | None:
        front = Front(ConfigError("SECRET"), tmp_path / "none", lambda: None)
        serving = asyncio.ensure_future(front.until_right(prepare, [listener]))
        await asyncio.to_thread(blocked.wait, 60)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 60)).startswith(b"HTTP/1.1 503 ")
        writer.close()
        told.clear()
        async with asyncio.timeout(60):
            while "WATCHDOG=1" not in told:
                await asyncio.sleep(0.001)
        assert not serving.done()
        answered.set()
        return await serving

    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert asyncio.run(serve(listener)) == "right"


def test_redis_has_two_seconds_for_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the settings allow; a URL's own time is among them."""
    made = []
    real = connection.connect

    def connect(*args: Any, **options: Any) -> Any:
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(connection, "connect", connect)
    for url in ("redis://127.0.0.1:1/0?socket_timeout=50", "unix:///nonexistent.sock"):
        broker = BrokerSettings(url=url, connect_timeout_s=30)
        cli._check_format(Settings(broker=broker))
        given = made[-1].connection_pool.connection_kwargs
        assert {given["socket_timeout"], given.get("socket_connect_timeout", 2.0)} == {2.0}


# -- whom it tells ------------------------------------------------------------------------


class Loaded:
    """What ``keys_dir`` asks the settings for."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def only(self, *_sections: str) -> Any:
        raise ConfigError("is not valid TOML", str(self._file))


def ask(keys_dir: Path | None, *headers: str, socket_in: Path | None = None) -> str:
    """Return the whole answer of a front with wrong settings to a request by loopback, or by its socket."""

    async def talk(_: Front, listener: socket.socket) -> str:
        address = listener.getsockname()
        if socket_in is not None:
            reader, writer = await asyncio.open_unix_connection(address)
        else:
            reader, writer = await asyncio.open_connection(*address)
        writer.write("\r\n".join(("GET / HTTP/1.1", *headers, "", "")).encode())
        text = (await reader.read()).decode()
        writer.close()
        return text

    if socket_in is None:
        return served(talk, keys_dir)
    path = socket_in / "api.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        return served(talk, keys_dir, listener)


@pytest.mark.parametrize(
    ("host", "told"),
    [("127.0.0.1:8080", True), ("localhost", True), ("[::1]", True), ("evil.example", False)],
)
def test_details_by_loopback_while_there_is_no_key(tmp_path: Path, host: str, told: bool) -> None:
    """For a name of this host: a page of a browser on it, whose name means this host now, learns nothing."""
    text = ask(tmp_path / "keys.d", f"Host: {host}")
    assert text.startswith("HTTP/1.1 503 ")
    assert ("SECRET" in text, "not_ready" in text) == (told, not told)


def test_no_details_by_loopback_with_a_key(tmp_path: Path) -> None:
    """A proxy that adds no header asks by loopback, too. The Unix socket is told all the same."""
    folder = tmp_path / "keys.d"
    folder.mkdir()
    (folder / "shop.toml").touch()
    host = "Host: localhost"
    assert "SECRET" not in ask(folder, host)
    assert "SECRET" not in ask(None, host)
    assert "SECRET" in ask(folder, host, socket_in=tmp_path)
    assert "SECRET" not in ask(folder, host, "Via: proxy", socket_in=tmp_path)


def test_the_folder_of_keys_while_the_file_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual one, unless the file may name another; the variable is stronger than the file."""
    file = tmp_path / "gpuinfer.toml"
    find = partial(misconfigured.keys_dir, Loaded(file), file)  # type: ignore[arg-type]
    assert find() is None
    file.write_text('[api\n#keys_dir = "/a"\n')
    assert find() == Path("/etc/gpuinfer/keys.d")
    for line in ('keys_dir = "/a"', 'api.keys_dir="/a"', 'api = {port = 1, "keys_dir" = "/a"}'):
        file.write_text(f"[api\n{line}\n")
        assert find() is None
    monkeypatch.setenv("GPUINFER_API_KEYS_DIR", str(tmp_path))
    assert find() == tmp_path


# -- how long it listens ------------------------------------------------------------------


def test_an_upload_may_take_longer_than_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who uploads slowly reads the 503, and is not reset: the head alone must come soon."""
    monkeypatch.setattr(misconfigured, "REST_S", 3600.0)

    async def upload(front: Front, listener: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"POST /predict HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        (limit,) = front._open
        left_s = (limit.when() or 0.0) - asyncio.get_running_loop().time()
        assert 60 < left_s <= 3600
        writer.write(bytes(1_000_000))
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        while front._open:
            await asyncio.sleep(0.001)

    served(upload)


def test_too_many_connections_end_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that say nothing, or send for ever, keep nobody out."""
    monkeypatch.setattr(misconfigured, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(misconfigured, "HEAD_S", 3600.0)

    async def crowd(front: Front, listener: socket.socket) -> None:
        streams = [await asyncio.open_connection(*listener.getsockname()) for _ in range(4)]
        for reader, _ in streams[:2]:
            assert await reader.read() == b""
        for reader, writer in streams[2:]:
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        assert len(front._open) == 2
        for _, writer in streams:
            writer.close()

    served(crowd)
