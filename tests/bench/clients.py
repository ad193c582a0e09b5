# SPDX-License-Identifier: Apache-2.0
"""CPU a task of the two client drivers, in this process alone: ``python -m tests.bench.clients``."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing

from gpuinfer import AsyncClient, Client
from tests.apis import HandWorker
from tests.services import RedisServer

TASKS, A_TURN = 4000, 200
INPUT = [1.0] * 16


def say(what: str, began: float) -> None:
    """Print the CPU a task since a moment."""
    print(f"{what:32} {(time.process_time() - began) / TASKS * 1e6:6.1f} us")


def sync(url: str, worker: HandWorker) -> None:
    """Measure the synchronous driver."""
    with Client(url) as client:
        client.submit(INPUT)
        began = time.process_time()
        ids = client.submit_many([INPUT] * TASKS)
        say("sync, submit_many", began)
        while worker.finish_all("done"):
            continue
        began = time.process_time()
        client.results(ids, 60)
        say("sync, results", began)
        began = time.process_time()
        for _ in range(TASKS):
            client.submit(INPUT)
        say("sync, submit one by one", began)


async def later(url: str, worker: HandWorker) -> None:
    """Measure the asyncio driver."""
    async with AsyncClient(url) as client:
        await client.submit(INPUT)
        began = time.process_time()
        ids = await client.submit_many([INPUT] * TASKS)
        say("asyncio, submit_many", began)
        while worker.finish_all("done"):
            continue
        began = time.process_time()
        await client.results(ids, 60)
        say("asyncio, results", began)
        began = time.process_time()
        for _ in range(TASKS // A_TURN):
            await asyncio.gather(*(client.submit(INPUT) for _ in range(A_TURN)))
        say(f"asyncio, submit, {A_TURN} a turn", began)


def main() -> None:
    """Measure both on a Redis of their own."""
    with closing(RedisServer()) as server, server.client() as admin:
        worker = HandWorker(admin)
        worker.register()
        sync(server.url, worker)
        asyncio.run(later(server.url, worker))


if __name__ == "__main__":
    main()
