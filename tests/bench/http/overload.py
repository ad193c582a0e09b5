# SPDX-License-Identifier: Apache-2.0
"""More work than a worker can do: a model that sleeps 10 ms an item, and three times its rate by HTTP.

    python -m tests.bench.http.overload [--seconds 15] [--realtime 0.7]

An open loop: requests come at random moments (Poisson), whatever becomes of those before them. First realtime
requests alone, ``--realtime`` of the worker's rate, each of which waits for its result; then the same again,
with so many for the queue ``batch`` that both are three times the rate. Prints a line of JSON: the rate that
the worker has with all it wants (peak); how much of it is done in the overload (goodput); how long a refusal
(429) takes and how long a realtime request.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import orjson

from tests.apis import Api
from tests.bench.http.client import Answer, Connections, percentile
from tests.models_for_tests import perceptron
from tests.services import RedisServer
from tests.workers import Workers

SLEEP_S = 0.01
#: Tasks that may wait; batch may have half of that.
MAX_WAITING = 200
_INPUTS = [0.5] * 64


class Load:
    """Requests at random moments."""

    def __init__(self, connections: Connections, path: str, body: dict[str, Any], rate: float) -> None:
        self._connections = connections
        self._path = path
        self._body = orjson.dumps(body)
        self._rate = rate
        self._random = random.Random(1)  # noqa: S311  no secret
        self.answers: list[Answer] = []

    async def run(self, seconds: float) -> None:
        """Send for so long; return when all are answered."""
        loop = asyncio.get_running_loop()
        at, until, asked = loop.time(), loop.time() + seconds, []
        while at < until:
            at += self._random.expovariate(self._rate)
            await asyncio.sleep(max(0.0, at - loop.time()))
            asked.append(asyncio.create_task(self._ask()))
        await asyncio.gather(*asked)

    async def _ask(self) -> None:
        self.answers.append(await self._connections.ask("POST", self._path, self._body))

    def taken(self, status: int) -> list[float]:
        """Return the milliseconds that answers with this status took."""
        return [one.seconds * 1000 for one in self.answers if one.status == status]


async def peak(connections: Connections, redis: Any, seconds: float) -> float:
    """Return how many tasks a second the worker does with all it wants."""
    body = orjson.dumps({"inputs": _INPUTS, "queue": "batch"})
    until = time.perf_counter() + seconds

    async def ask() -> None:
        while time.perf_counter() < until:
            await connections.ask("POST", "/predict?wait=30", body)

    askers = [asyncio.create_task(ask()) for _ in range(32)]
    await asyncio.sleep(1)
    before, began = _ended(redis), time.perf_counter()
    await asyncio.sleep(seconds - 2)
    rate = (_ended(redis) - before) / (time.perf_counter() - began)
    await asyncio.gather(*askers)
    return rate


def _ended(redis: Any) -> int:
    """Return how many tasks were claimed so far: of those, all but a batch have ended."""
    return sum(map(int, redis.hvals("gpuinfer:claimed")))


async def _measure(port: int, redis: Any, seconds: float, share: float) -> dict[str, Any]:
    connections = Connections("127.0.0.1", port)
    await connections.open(64)
    most = await peak(connections, redis, max(4.0, seconds / 3))
    urgent = {"inputs": _INPUTS, "queue": "realtime"}
    alone = Load(connections, "/predict?wait=30", urgent, share * most)
    await alone.run(seconds)
    beside = Load(connections, "/predict?wait=30", urgent, share * most)
    batch = Load(connections, "/predict", {"inputs": _INPUTS, "queue": "batch"}, (3 - share) * most)
    running = asyncio.gather(beside.run(seconds), batch.run(seconds))
    await asyncio.sleep(1)
    before, began = _ended(redis), time.perf_counter()
    await asyncio.sleep(seconds - 2)
    goodput = (_ended(redis) - before) / (time.perf_counter() - began)
    await running
    connections.close()
    refused = batch.taken(429)
    return {
        "peak_per_s": round(most, 1),
        "goodput_per_s": round(goodput, 1),
        "goodput_share": round(goodput / most, 3),
        "accepted": len(batch.taken(202)),
        "refused": len(refused),
        "refusal_p50_ms": round(percentile(refused, 0.5), 2),
        "refusal_p99_ms": round(percentile(refused, 0.99), 2),
        "realtime": len(beside.taken(200)),
        "realtime_alone_p50_ms": round(percentile(alone.taken(200), 0.5), 2),
        "realtime_alone_p99_ms": round(percentile(alone.taken(200), 0.99), 2),
        "realtime_p50_ms": round(percentile(beside.taken(200), 0.5), 2),
        "realtime_p99_ms": round(percentile(beside.taken(200), 0.99), 2),
    }


@click.command()
@click.option("--seconds", default=15.0, show_default=True, help="Of each of the two loads.")
@click.option("--realtime", default=0.7, show_default=True, help="Realtime requests, of the worker's rate.")
def main(seconds: float, realtime: float) -> None:
    """Measure, and print one line of JSON."""
    with tempfile.TemporaryDirectory(prefix="gi-http-") as name:
        folder = Path(name)
        perceptron(folder / "models" / "stub", max_batch_size=1)
        server = RedisServer()
        workers = Workers(server, folder)
        try:
            command = ("env", f"BENCH_SLEEP_S={SLEEP_S}", sys.executable, "-m", "tests.bench.sleeping")
            process = workers.spawn(
                *command, "worker", "0", name="worker0", worker_models="stub", queue_max_waiting=MAX_WAITING
            )
            process.wait_for_line('"worker_ready"')
            with Api(server, folder, queue_max_waiting=MAX_WAITING) as api, server.client() as redis:
                port = int(api.address.rpartition(":")[2])
                found = asyncio.run(_measure(port, redis, seconds, realtime))
        finally:
            workers.close()
            server.close()
    click.echo(orjson.dumps(found).decode())


if __name__ == "__main__":
    main()
