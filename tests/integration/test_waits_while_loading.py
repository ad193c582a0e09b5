# SPDX-License-Identifier: Apache-2.0
"""Waits over restarts of a Redis that takes its time to load.

``GPUINFER_RESTARTS=200`` for the long form.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import BusyLoadingError

from gpuinfer.client import AsyncClient, Client
from gpuinfer.queue import keys, results
from gpuinfer.settings import Settings
from tests.conftest import RedisFactory
from tests.services import RedisServer

pytestmark = pytest.mark.integration

#: Read at import: the tests take variables of this name away.
RESTARTS = int(os.environ.get("GPUINFER_RESTARTS", "20"))
WAITERS = 16
#: A quarter of a second of loading.
KEYS, DELAY_US = 250, 1000


def end_in_silence(server: RedisServer, ids: list[str]) -> None:
    """Write results as a worker does whose publication nobody heard; save, and kill Redis."""
    with server.client() as connection:
        for task_id in ids:
            connection.set(keys.result(task_id), results.success(task_id, "done", worker="gpu0@test"))
        connection.save()
    server.kill()


async def test_waits_end_after_a_restart_that_loads(
    redis_factory: RedisFactory, settings_for: Callable[..., Settings]
) -> None:
    """Own tasks and another client's, asyncio and sync: each wait ends once Redis has loaded."""
    server = redis_factory(key_load_delay=DELAY_US, loading_process_events_interval_bytes=1024)
    with server.client() as connection:
        connection.mset({f"filler:{i}": "x" * 100 for i in range(KEYS)})
    settings = settings_for(server)
    async with AsyncClient(settings) as client, AsyncClient(settings) as other:
        for _ in range(RESTARTS):
            with Client(settings) as sync:
                own, others = (
                    await client.submit_many(range(WAITERS)),
                    await other.submit_many(range(WAITERS)),
                )
                waits = [
                    asyncio.ensure_future(client.result(task_id, 120))
                    for task_id in own + others[: WAITERS // 2]
                ]
                waits += [
                    asyncio.ensure_future(asyncio.to_thread(sync.results, others[at::2], 120))
                    for at in (0, 1)
                ]
                with server.client() as connection:  # later, they would be told that Redis is away
                    twice = [keys.result(task_id) for task_id in others[: WAITERS // 2]]
                    while (
                        len(connection.pubsub_channels()) < 1 + WAITERS
                        or min(count for _, count in connection.pubsub_numsub(*twice)) < 2
                        or len(client._waits._watches) < WAITERS + WAITERS // 2
                        or client._pipe.busy
                    ):
                        await asyncio.sleep(0.01)
                await asyncio.to_thread(end_in_silence, server, own + others)
                await asyncio.to_thread(server.start)
                found = await asyncio.gather(*waits)
            assert found[:-2] == ["done"] * (WAITERS + WAITERS // 2)
            assert found[-2] + found[-1] == ["done"] * WAITERS


async def test_a_look_that_fails_is_repeated(
    redis_server: RedisServer, settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subscription stands, so no second confirmation comes: the look must be tried until it works."""
    async with AsyncClient(settings_for(redis_server)) as client:
        task_id = await client.submit([1])
        call, looks = client._pipe.call, 0

        def refuse_some(*command: Any) -> asyncio.Future[Any]:
            nonlocal looks
            looks += 1
            if looks == 5:
                with redis_server.client() as connection:
                    meta = results.success(task_id, "done", worker="gpu0@test")
                    connection.set(keys.result(task_id), meta)
            if 1 < looks < 5:  # the first is the one before anything is waited for
                refused = asyncio.get_running_loop().create_future()
                refused.set_exception(BusyLoadingError("Redis is loading the dataset in memory"))
                return refused
            return call(*command)

        monkeypatch.setattr(client._pipe, "call", refuse_some)
        assert await asyncio.wait_for(client.result(task_id), 120) == "done"
        assert looks == 5
