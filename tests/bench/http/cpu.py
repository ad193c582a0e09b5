# SPDX-License-Identifier: Apache-2.0
"""What a prediction costs the front itself: its own code and uvicorn's, without sockets, Redis and a worker.

    python -m tests.bench.http.cpu [--requests 20000] [--at-once 16] [--keys] [--profile]

Connections that are not there send requests into the server's protocol, all of a turn of the event loop at
once; a Redis that is not there accepts the tasks and tells their ends. Prints microseconds of processor time
for one prediction that is waited for, the least of twenty rounds, without what the stand-ins take.
"""

from __future__ import annotations

import asyncio
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import hiredis
import uvicorn
import uvloop
from uvicorn.server import ServerState

from gpuinfer.api.front import Front
from gpuinfer.api.protocol import Protocol
from gpuinfer.api.server import settle_memory
from gpuinfer.client import calls
from gpuinfer.client.aio import AsyncClient
from gpuinfer.keys.key import Key, digest, make_token, serialise
from gpuinfer.queue import results
from gpuinfer.settings import ApiSettings, Settings

ROUNDS = 20
_BODY = str([round(place / 64, 6) for place in range(64)]).replace(" ", "").encode()
_HEAD = (
    b"POST /predict?wait=30 HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n%b\r\n"
)
_TOKEN = make_token()
_ABOUT = {
    "queue": "realtime",
    "model": "perceptron",
    "version": "1",
    "attempt": 1,
    "run_ms": 0.711,
    "batch_size": 16,
}
#: Where a call of the submit script has its first task's id.
_FIRST = 3 + calls.HEAD
_RESULT = {"predictions": [{"class": 3, "label": "3", "confidence": 0.113421}]}


class FakeTransport(asyncio.Transport):
    """A connection whose client asks again as soon as it is answered."""

    def __init__(self, again: Callable[[FakeTransport], None]) -> None:
        super().__init__()
        self._again = again
        self.protocol: Any = None
        self.wrote = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.wrote += data
        if self.wrote.endswith(b"}\n"):
            if b" 200 OK" not in self.wrote[:16] or b'"completed"' not in self.wrote:
                sys.stderr.write(self.wrote.decode())
                os._exit(1)  # whoever calls this would take an exception for its own
            self.wrote = b""
            self._again(self)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        return None

    def pause_reading(self) -> None:
        return None

    def resume_reading(self) -> None:
        return None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"sockname": ("127.0.0.1", 8080), "peername": ("127.0.0.1", 40000)}.get(name, default)


class FakeRedis:
    """Both of the client's connections: one that commands are sent on, one that results come on."""

    def __init__(self, client: AsyncClient) -> None:
        self.channel = client._origin.channel.encode()
        meta = results.success(
            "#id#", _RESULT, worker="gpu0@host", times={"sent_at": 1.5, "began_at": 1.6}, about=_ABOUT
        )
        self._before, self._after = meta.split(b"#id#")
        self.commands = Stream(self._commanded)
        self.told = Stream(self._listened)

    def _commanded(self, data: bytes) -> None:
        reader = hiredis.Reader()
        reader.feed(data)
        ids: list[bytes] = []
        while (command := reader.gets()) is not False:
            if command[0] == b"MGET":
                pending = b"$%d\r\n%b\r\n" % (len(results.PENDING_META), results.PENDING_META)
                self.commands.answer(b"*%d\r\n" % (len(command) - 1) + pending * (len(command) - 1))
                continue
            if command[0] != b"EVALSHA":
                self.commands.answer(b"$-1\r\n" if command[0] != b"GET" else b"$10\r\nperceptron\r\n")
                continue
            tasks = command[_FIRST::3]
            ids += tasks
            holder = b"$%d\r\n%b\r\n" % (len(tasks[0]), tasks[0]) if tasks else b":1\r\n"
            rated = tasks and command[_FIRST - 1]
            self.commands.answer(b"*3\r\n%b:7\r\n$3\r\n0.1\r\n" % holder if rated else holder)
        if ids:
            metas = b"[%b]" % b",".join(self._before + one + self._after for one in ids)
            head = b"*3\r\n$7\r\nmessage\r\n$%d\r\n%b\r\n" % (len(self.channel), self.channel)
            self.told.answer(head + b"$%d\r\n%b\r\n" % (len(metas), metas))

    def _listened(self, data: bytes) -> None:
        if b"\r\nSUBSCRIBE\r\n" in data:
            head = b"*3\r\n$9\r\nsubscribe\r\n$%d\r\n%b\r\n:1\r\n" % (len(self.channel), self.channel)
            self.told.answer(head)


class Stream:
    """A connection of redis-py's as far as Pipe and Subscription use it."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write
        self._reader = asyncio.StreamReader()
        self._writer = self
        self._parser = self
        self.is_connected = True

    def parse_error(self, text: str) -> Exception:
        return ValueError(text)

    def answer(self, data: bytes) -> None:
        self._reader.feed_data(data)

    async def disconnect(self, nowait: bool = False) -> None:
        return None


async def _run(requests: int, at_once: int, folder: Path, *, keys: bool, profile: bool) -> list[float]:
    """Return microseconds a prediction of each round; with ``keys`` by one of 50, with a rate and a model."""
    for number in range(50 if keys else 0):
        token = _TOKEN if number == 7 else make_token()
        key = Key(name=f"key-{number}", sha256=digest(token), rate=1e6, models=("perceptron",))
        (folder / f"{key.name}.toml").write_text(serialise(key))
    front = Front(Settings(api=ApiSettings(keys_dir=folder)))
    client = front.shared.client = AsyncClient("redis://127.0.0.1:1/0")
    redis = FakeRedis(client)
    cast(Any, client._pipe)._connection = redis.commands
    cast(Any, client._waits._subscription)._connection = redis.told
    config = uvicorn.Config(front, lifespan="off", log_config=None, access_log=False, proxy_headers=False)
    config.timeout_keep_alive = 75
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    shown = f"Authorization: Bearer {_TOKEN}\r\n".encode() if keys else b""
    request = _HEAD % (len(_BODY), shown) + _BODY
    left, over = 0, asyncio.Event()

    def again(transport: FakeTransport) -> None:
        nonlocal left
        left -= 1
        if left >= at_once:
            loop.call_soon(transport.protocol.data_received, request)
        elif left == 0:
            over.set()

    transports = [FakeTransport(again) for _ in range(at_once)]
    for transport in transports:
        transport.protocol = Protocol(config, state, {}, loop)
        transport.protocol.connection_made(transport)
    settle_memory()
    spent = []
    profiler = cProfile.Profile()
    for number in range(ROUNDS + 1):
        left = requests if number else 500
        over.clear()
        if profile and number == ROUNDS:
            profiler.enable()
        began = time.process_time()
        for transport in transports:
            loop.call_soon(transport.protocol.data_received, request)
        await over.wait()
        spent.append((time.process_time() - began) / requests * 1e6)
    if profile:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(70)
    return spent[1:]


def _stand_ins(requests: int, at_once: int) -> float:
    """Return the microseconds that a prediction costs the stand-ins."""
    client = AsyncClient("redis://127.0.0.1:1/0")

    async def measure() -> float:
        redis = FakeRedis(client)
        ids = [client._origin.new_id() for _ in range(at_once)]
        arguments = [argument for one in ids for argument in (one, _BODY * 2, b"1]}")]
        command: tuple[Any, ...] = ("EVALSHA", "0" * 40, 0, *[b""] * calls.HEAD, *arguments)
        packed = hiredis.pack_command(command)
        began = time.process_time()
        for _ in range(requests // at_once):
            redis._commanded(packed)
            await redis.commands._reader.read(1 << 20)
            await redis.told._reader.read(1 << 20)
        return (time.process_time() - began) / (requests // at_once * at_once) * 1e6

    return uvloop.run(measure())


@click.command()
@click.option("--requests", default=1500, show_default=True, help="Of each round.")
@click.option("--at-once", default=16, show_default=True, help="Requests of one turn of the event loop.")
@click.option("--keys", is_flag=True, help="Each request has a key, and the key a rate and a model.")
@click.option("--profile", is_flag=True, help="Print where the time of the last round went.")
def main(requests: int, at_once: int, keys: bool, profile: bool) -> None:
    """Measure, and print one line."""
    with tempfile.TemporaryDirectory(prefix="gi-keys-") as folder:
        spent = uvloop.run(_run(requests, at_once, Path(folder), keys=keys, profile=profile))
    theirs = _stand_ins(requests, at_once)
    click.echo(f"{min(spent) - theirs:.1f} us a prediction ({theirs:.1f} us of stand-ins are not counted)")


if __name__ == "__main__":
    main()
