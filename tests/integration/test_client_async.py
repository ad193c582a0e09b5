# SPDX-License-Identifier: Apache-2.0
"""The asyncio client against a real Redis; tasks are ended as a worker ends them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from gpuinfer.client.aio import AsyncClient
from gpuinfer.errors import BrokerUnavailable, TaskNotFound, TaskRevoked, UnknownModel, WaitTimeout
from gpuinfer.queue.message import decode
from gpuinfer.settings import Settings
from tests.apis import HandWorker
from tests.conftest import RedisFactory
from tests.services import RedisServer

pytestmark = pytest.mark.integration


def later(seconds: float, action: Callable[[], object]) -> threading.Timer:
    """Do something from another thread in a moment."""
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


async def test_async_submit_and_result(settings: Settings, worker: HandWorker) -> None:
    """As the sync client."""
    async with AsyncClient(settings) as client:
        task_id = await client.submit([1, 2])
        timer = later(0.2, lambda: worker.finish_all("done"))
        assert await client.result(task_id, 60) == "done"
        timer.join()
        task_id = await client.submit([3])
        with pytest.raises(WaitTimeout):
            await client.result(task_id, 0.2)
        assert await client.cancel(task_id) is True
        with pytest.raises(TaskRevoked):
            await client.result(task_id)


async def test_async_burst_of_calls(settings: Settings, worker: HandWorker) -> None:
    """1,000 calls at once wait for a free connection; none fails."""
    async with AsyncClient(settings) as client:
        ids = await asyncio.gather(*(client.submit(number) for number in range(1000)))
        assert len(set(ids)) == 1000
        waits = asyncio.gather(*(client.result(task_id, 60) for task_id in ids))
        while len(client._waits._watches) < 1000:
            await asyncio.sleep(0.01)
        for task in worker.claim(1000):
            worker.finish(task, decode(task.payload).body()[0][0])
        assert await waits == list(range(1000))
        assert len(worker.store.client.client_list()) < 50


async def test_async_submit_many_and_results(settings: Settings, worker: HandWorker) -> None:
    """2,000 tasks, awaited together, in order."""
    async with AsyncClient(settings) as client:
        ids = await client.submit_many(range(2000))
        for task in worker.claim(2000):
            worker.finish(task, decode(task.payload).body()[0][0])
        assert await client.results(ids, 60) == list(range(2000))


async def test_async_as_completed(settings: Settings, worker: HandWorker) -> None:
    """The first to end comes first; leaving early leaves no listener of another client's tasks behind."""
    async with AsyncClient(settings) as client, AsyncClient(settings) as other:
        ids = await other.submit_many([0, 1, 2])
        tasks = worker.claim(3)
        worker.finish(tasks[1], "second")
        ended = client.as_completed(ids, 60)
        assert (await anext(ended)).id == ids[1]
        await ended.aclose()  # type: ignore[attr-defined]  # it is a generator
        until = time.monotonic() + 60
        while worker.store.client.pubsub_channels() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        assert worker.store.client.pubsub_channels() == []


async def test_a_cancelled_wait_ends_wherever_it_is(settings: Settings) -> None:
    """Cancelled at any step of looking and subscribing, a wait ends at once."""
    async with AsyncClient(settings) as client:
        task_id = await client.submit([1])
        for steps in range(60):
            wait = asyncio.ensure_future(client.wait(task_id, 120))
            for _ in range(steps):
                await asyncio.sleep(0)
            wait.cancel()
            done, _ = await asyncio.wait([wait], timeout=60)
            assert done, f"goes on after being cancelled at step {steps}"
            assert wait.cancelled()


async def test_two_waiters_of_one_task(settings: Settings, worker: HandWorker) -> None:
    """Both are told; one that gives up does not take the other's subscription away."""
    async with AsyncClient(settings) as client:
        task_id = await client.submit([1])
        long = asyncio.ensure_future(client.result(task_id, 60))
        with pytest.raises(WaitTimeout):
            await client.result(task_id, 0.2)
        worker.finish_all("done")
        assert await asyncio.wait_for(long, 60) == "done"


async def test_async_waits_span_a_restart_of_redis(
    redis_factory: RedisFactory, settings_for: Callable[..., Settings]
) -> None:
    """Old waiters and those that come just after the restart all get their results.

    Half of the tasks are another client's: each is heard of on a channel of its own.
    """
    server = redis_factory(appendonly="yes", appendfsync="always")
    async with AsyncClient(settings_for(server)) as client, AsyncClient(settings_for(server)) as other:
        for _ in range(3):
            own, others = await client.submit_many(range(10)), await other.submit_many(range(10))
            ids = own[:5] + others[:5] + own[5:] + others[5:]
            waits = [asyncio.ensure_future(client.result(task_id, 60)) for task_id in ids[:10]]
            with server.client() as connection:
                # Those whose first look is not answered yet would be told that Redis is away.
                while (
                    len(connection.pubsub_channels()) < 6
                    or len(client._waits._watches) < 10
                    or client._pipe.busy
                ):
                    await asyncio.sleep(0.01)
            server.kill()
            with pytest.raises(BrokerUnavailable):
                await client.status(ids[0])
            server.start()
            waits += [asyncio.ensure_future(client.result(task_id, 60)) for task_id in ids[10:]]
            await asyncio.sleep(0.05)
            with server.client() as connection:
                assert HandWorker(connection).finish_all("done") == 20
            assert await asyncio.wait_for(asyncio.gather(*waits), 60) == ["done"] * 20


async def test_a_lost_queue_is_told(redis_server: RedisServer, settings: Settings) -> None:
    """A Redis that comes back empty: waiters are told that the task is unknown, not left waiting."""
    async with AsyncClient(settings) as client:
        task_id = await client.submit([1])
        wait = asyncio.ensure_future(client.result(task_id, 120))
        with redis_server.client() as connection:
            # One whose first look is not answered yet would be told that Redis is away.
            while not connection.pubsub_channels() or not client._waits._watches or client._pipe.busy:
                await asyncio.sleep(0.01)
        redis_server.kill()
        await asyncio.sleep(0.3)
        redis_server.start()
        with pytest.raises(TaskNotFound):
            await asyncio.wait_for(wait, 60)


async def test_async_unknown_models_are_refused(settings: Settings, worker: HandWorker) -> None:
    """As by the sync client."""
    worker.register()
    async with AsyncClient(settings) as client:
        with pytest.raises(UnknownModel, match="known: digits"):
            await client.submit([1], model="resnet")
        with pytest.raises(UnknownModel, match="known: digits"):
            await client.submit_many([[1], [2]], model="resnet")
        with pytest.raises(UnknownModel, match="known: digits"):
            await client.submit_batch([[1], [2]], model="resnet")
    assert worker.claim(10) == []
