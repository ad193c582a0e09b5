# SPDX-License-Identifier: Apache-2.0
"""The short ways of the front: a whole answer in one packet, and one timer for many waits and connections."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from gpuinfer.api.lasting import Lastings
from gpuinfer.api.middleware import _Watched
from gpuinfer.api.protocol import HEAD_BYTES, MOST_BEHIND, Protocol, _split
from gpuinfer.api.reply import send_bytes

pytestmark = pytest.mark.unit

REQUEST = b"GET /x?a=1 HTTP/1.1\r\nhost: here\r\n\r\n"


class Wire(asyncio.Transport):
    """A connection that keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)})
        self.packets: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.packets.append(bytes(data))

    def pause_reading(self) -> None:
        return None

    def resume_reading(self) -> None:
        return None

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def connect(app: Any) -> tuple[Wire, Protocol]:
    config = uvicorn.Config(app, lifespan="off", log_config=None, proxy_headers=False)
    config.timeout_keep_alive = 60
    config.load()
    wire = Wire()
    connection = Protocol(config, ServerState(), {}, asyncio.get_running_loop())
    connection.connection_made(wire)
    return wire, connection


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def answering(headers: list[tuple[bytes, bytes]], *, whole: bool = True) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        watched = _Watched(send, asyncio.Event())
        if not whole:
            watched._answer = None
        await send_bytes(scope, watched, b"body\n", b"text/plain", 202, headers)
        assert (watched.status, watched.sent) == (202, 5)

    return app


@pytest.mark.parametrize("headers", [[], [(b"location", b"/x")], [(b"connection", b"close")]])
async def test_a_whole_answer_is_one_packet(headers: list[tuple[bytes, bytes]]) -> None:
    """It says what two messages of ASGI say."""
    said = []
    for whole in (True, False):
        wire, connection = connect(answering(headers, whole=whole))
        connection.data_received(REQUEST)
        await until(lambda: b"".join(wire.packets).endswith(b"body\n"))  # noqa: B023
        assert len(wire.packets) == (1 if whole else 2)
        head, _, body = b"".join(wire.packets).partition(b"\r\n\r\n")
        said.append((sorted(head.lower().split(b"\r\n")), body, wire.closed))
    assert said[0] == said[1]
    assert said[0][2] is bool(headers and headers[0][0] == b"connection")


async def test_no_header_is_smuggled_in() -> None:
    """A value with a line break is a mistake of ours, and answered as one."""
    wire, connection = connect(answering([(b"location", b"/x\r\nset-cookie: a=b")]))
    connection.data_received(REQUEST)
    await until(lambda: wire.packets)
    assert wire.packets[0].startswith(b"HTTP/1.1 500 ")
    assert b"set-cookie" not in b"".join(wire.packets)


async def test_an_old_client_is_told_that_the_connection_ends() -> None:
    """HTTP/1.0 keeps no connection."""
    wire, connection = connect(answering([]))
    connection.data_received(REQUEST.replace(b"1.1", b"1.0"))
    await until(lambda: wire.closed)
    assert b"connection: close\r\n" in wire.packets[0]


async def test_requests_in_a_row_are_answered_in_order() -> None:
    """Those of one packet wait for each other."""
    wire, connection = connect(answering([]))
    connection.data_received(REQUEST * 3)
    await until(lambda: len(wire.packets) == 3)


async def test_a_connection_ends_with_the_last_request_that_may_wait() -> None:
    """What comes behind it is not kept, nor is its body taken for another's."""
    asked, go = [], asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        asked.append((await receive())["body"])
        await answering([])(scope, receive, send)

    wire, connection = connect(app)
    post = b"POST /x HTTP/1.1\r\nhost: here\r\ncontent-length: 4\r\n\r\n"
    connection.data_received((post + b"mine") * (MOST_BEHIND + 1) + (post + b"more") * 1000)
    connection.data_received(post + b"more")
    assert len(connection.pipeline) == MOST_BEHIND
    go.set()
    await until(lambda: wire.closed)
    assert asked == [b"mine"] * (MOST_BEHIND + 1)
    assert [b"connection: close" in packet for packet in wire.packets] == [False] * MOST_BEHIND + [True]


async def test_nothing_is_read_while_requests_wait() -> None:
    """Else each answer would let in more of them than it takes away."""
    wire, connection = connect(answering([]))
    connection.data_received(REQUEST * 3)
    assert connection.flow.read_paused
    read_on = []
    wire.resume_reading = lambda: read_on.append(len(wire.packets))  # type: ignore[method-assign]
    await until(lambda: len(wire.packets) == 3)
    assert read_on == [3]


CHUNKED = b"POST /x HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_trailers_are_no_headers() -> None:
    """A request is what it was when its head had come, and the next one has a head of its own."""
    wire, connection = connect(answering([]))
    connection.data_received(CHUNKED + b"4\r\nbody\r\n0\r\nx-api-key: gpi_x\r\n\r\n")
    assert connection.headers == [(b"host", b"here"), (b"transfer-encoding", b"chunked")]
    await until(lambda: wire.packets)
    connection.data_received(REQUEST)
    assert connection.headers == [(b"host", b"here")]
    await until(lambda: len(wire.packets) == 2)
    assert not wire.closed


@pytest.mark.parametrize("beside", [b"4\r\nbody\r\n0\r\n", b"4\r\nbody\r\n0\r\na: ", b"4;"])
async def test_what_stands_beside_a_body_is_bounded(beside: bytes) -> None:
    """Trailers, one trailer without an end, or the extension of a chunk."""
    wire, connection = connect(answering([]))
    connection.data_received(CHUNKED + b"4\r\nbody\r\n")
    connection.data_received(beside)
    for _ in range(HEAD_BYTES // 4096):
        assert not wire.closed
        connection.data_received(b"a:b\r\n" * 820 if beside.endswith(b"0\r\n") else b"a" * 4100)
    assert wire.closed


async def test_a_body_may_be_long() -> None:
    """Its content is not counted, in however many chunks it comes."""
    wire, connection = connect(answering([]))
    connection.data_received(CHUNKED)
    for _ in range(3 * HEAD_BYTES // 8192):
        connection.data_received(b"2000\r\n" + b"a" * 8192 + b"\r\n")
    connection.data_received(b"0\r\n\r\n")
    await until(lambda: wire.packets)
    assert not wire.closed


async def test_an_idle_connection_is_closed_once_it_was_idle_long_enough() -> None:
    """One timer is enough: it looks again where a request has come meanwhile."""
    wire, connection = connect(answering([]))
    connection.data_received(REQUEST)
    await until(lambda: wire.packets)
    await until(lambda: connection._idle is not None)
    now = asyncio.get_running_loop().time()
    for since, closed in ((None, False), (now - 30, False), (now - 61, True)):
        connection._idle_since = since
        connection._close_idle()
        assert wire.closed is closed
    connection.connection_lost(None)


@pytest.mark.parametrize("rest", [b"", b"a", b"abcd", b"abcd\r\n"])
async def test_what_is_no_request_keeps_no_connection_open(rest: bytes) -> None:
    """The rest of one that was answered, and empty lines; a head that begins has a time of its own."""
    wire, connection = connect(answering([]))
    connection.data_received(REQUEST.replace(b"\r\n\r\n", b"\r\ncontent-length: 4\r\n\r\n"))
    await until(lambda: wire.packets)
    await until(lambda: connection._idle is not None)
    since = connection._idle_since
    connection.data_received(rest)
    assert connection._idle_since == since is not None
    connection.data_received(b"abcd"[len(rest) :] + b"GET /")
    assert connection._idle_since is None
    assert connection._late is not None
    connection.connection_lost(None)


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"\0\r\n\r\n", b"HTTP/1.1 400 "),
        (
            b"GET /x HTTP/1.1\r\nhost: here\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
            b"HTTP/1.1 202 ",
        ),
    ],
)
async def test_nobody_fills_the_log(request_: bytes, answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What is no HTTP, or asks for another protocol, has its answer, and no line."""
    wire, connection = connect(answering([]))
    connection.data_received(request_)
    await until(lambda: wire.packets)
    assert wire.packets[0].startswith(answer)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        (b"/predict?wait=5&a=?", (b"/predict", b"wait=5&a=?")),
        (b"/", (b"/", b"")),
        (b"/x#y", (b"/x", b"")),
        (b"http://here:80/x?y", (b"/x", b"y")),
    ],
)
def test_a_target_is_path_and_query(url: bytes, parts: tuple[bytes, bytes]) -> None:
    """The usual form is split here; every other is read as uvicorn reads it."""
    assert _split(url) == parts


class One:
    """A wait."""

    def __init__(self) -> None:
        self.ended = False
        self.told = 0

    def lasts(self) -> None:
        self.told += 1


async def test_what_lasts_is_told_once() -> None:
    """What has ended before costs no timer, and is forgotten."""
    lastings = Lastings(0.02)
    short, long = One(), One()
    lastings.add(short)
    lastings.add(long)
    short.ended = True
    await until(lambda: long.told)
    assert (short.told, long.told, len(lastings)) == (0, 1, 0)
    later = One()
    lastings.add(later)
    await until(lambda: later.told)
    assert long.told == 1


@pytest.mark.parametrize(("before", "end"), [(0, "shutdown"), (1, "shutdown"), (1, "_close_idle")])
def test_a_request_that_has_arrived_when_a_connection_ends_is_answered(before: int, end: str) -> None:
    """It lies in the socket's buffer, and nobody has read it; a connection without one is closed."""

    async def serve() -> list[bytes]:
        config = uvicorn.Config(answering([]), lifespan="off", log_config=None, proxy_headers=False)
        config.load()
        state, loop = ServerState(), asyncio.get_running_loop()
        server = await loop.create_server(lambda: Protocol(config, state, {}), "127.0.0.1", 0)
        callers = [socket.create_connection(server.sockets[0].getsockname()) for _ in range(2)]
        for caller in callers:
            caller.setblocking(False)
            for _ in range(before):
                await loop.sock_sendall(caller, REQUEST)
                assert b"202" in await loop.sock_recv(caller, 65536)
        await until(lambda: len(state.connections) == 2)
        callers[0].sendall(REQUEST)
        for connection in list(state.connections):
            assert isinstance(connection, Protocol)
            connection.timeout_keep_alive = 0
            getattr(connection, end)()
        answers = [await asyncio.wait_for(loop.sock_recv(caller, 65536), 60) for caller in callers]
        await until(lambda: not state.connections)
        for caller in callers:
            caller.close()
        server.close()
        return answers

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answered, closed = runner.run(serve())
    assert answered.startswith(b"HTTP/1.1 202 ")
    assert (b"connection: close" in answered) == (end == "shutdown")
    assert closed == b""
