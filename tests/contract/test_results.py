# SPDX-License-Identifier: Apache-2.0
"""Large results: set beside, renamed when their task ends, told by a notice, and fetched as any other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery
from redis.exceptions import OutOfMemoryError

from gpuinfer import AsyncClient, Client
from gpuinfer.queue import keys
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.connection import celery_urls
from gpuinfer.queue.message import decode
from gpuinfer.queue.settling import BESIDE_BYTES
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, Settings
from tests.contract.conftest import done, on
from tests.workers import wait_until

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

LARGE = "x" * 2 * BESIDE_BYTES


@pytest.fixture
def waiter() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def told(task: Claimed, value: Any) -> Final:
    """Return an end of which the client that submitted the task hears."""
    return done(task, value)._replace(reply=decode(task.payload).reply_to)


def listened(store: Store, channel: str) -> bool:
    found: Any = store.client.pubsub_numsub(channel)
    return bool(found[0][1])


def test_it_does_not_pass_through_lua(store: Store, client: Client) -> None:
    """The script sees a notice alone; state, time to live and counters are as for any other."""
    large, small = client.submit_many([[1]] * 2)
    one, other = store.claim(2)
    finals = [done(one, LARGE)._replace(label="completed realtime digits"), done(other, 2)]
    seen: list[int] = []
    script = store._settling._settle

    def spy(**call: Any) -> Any:
        seen.append(max(len(arg) for arg in call["args"] if isinstance(arg, bytes)))
        return script(**call)

    store._settling._settle = spy
    assert store.settle(finals) == {}
    assert seen[0] < 1000
    assert client.result(large, 0) == LARGE
    assert client.result(small, 0) == 2
    assert not store.client.exists(keys.beside(large), store.inflight)
    assert 3000 < store.client.ttl(keys.result(large)) <= 3600
    raw: Any = store.client
    assert int(raw.hget(keys.ENDED, "bytes realtime digits")) == len(finals[0].meta)
    assert store.settle(finals) == {}  # again, as after an answer that was lost
    assert int(raw.hget(keys.ENDED, "completed realtime digits")) == 1


def test_who_waits_is_told(store: Store, client: Client, waiter: ThreadPoolExecutor) -> None:
    """The client that submitted it hears on its reply channel and looks; another one hears it by id."""
    task = client.submit([1])
    small = client.submit([1])
    found: Future[Any] = waiter.submit(client.results, [task, small], 60)
    wait_until(lambda: listened(store, client._origin.channel), 60)
    store.settle([told(one, LARGE if n == 0 else 1) for n, one in enumerate(store.claim(2))])
    assert found.result(60) == [LARGE, 1]


def test_who_waits_by_id_is_told(
    store: Store, client: Client, broker: BrokerSettings, waiter: ThreadPoolExecutor
) -> None:
    """Celery's AsyncResult takes what is published for the result itself."""
    url, backend = celery_urls(broker)
    if broker.tls_ca:
        pytest.skip("the same, with more options")
    task = client.submit([1])
    with Celery("other", broker=url, backend=backend, set_as_current=False) as app:
        found = waiter.submit(app.AsyncResult(task).get, timeout=60)
        wait_until(lambda: listened(store, keys.result(task)), 60)
        store.settle([done(one, LARGE) for one in store.claim(1)])
        assert found.result(60) == LARGE


async def test_who_waits_in_an_event_loop_is_told(store: Store, broker: BrokerSettings) -> None:
    """The same for the asyncio client."""
    async with AsyncClient(Settings(broker=broker)) as client:
        task = await client.submit([1])
        wait = asyncio.create_task(client.wait(task, 60))
        while not await asyncio.to_thread(listened, store, client._origin.channel):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(lambda: store.settle([told(one, LARGE) for one in store.claim(1)]))
        assert (await wait).result == LARGE


def test_one_that_is_gone_or_refused_goes_by_script(
    store: Store, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evicted between the two calls, or not taken by a full Redis: it is written all the same."""
    first, second = client.submit_many([[1]] * 2)
    one, other = store.claim(2)
    real = store._settling._set_beside
    monkeypatch.setattr(
        store._settling,
        "_set_beside",
        lambda finals: (real(finals), store.client.delete(keys.beside(first)))[0],
    )
    assert store.settle([done(one, LARGE)]) == {}
    monkeypatch.undo()
    pipe = type(store.client.pipeline())
    refused = OutOfMemoryError("command not allowed when used memory > 'maxmemory'")
    monkeypatch.setattr(pipe, "execute", lambda self, raise_on_error: [refused] * len(self.command_stack))
    assert store.settle([done(other, LARGE)]) == {}
    monkeypatch.undo()
    assert client.results([first, second], 0) == [LARGE, LARGE]


def test_an_end_that_stands_is_not_written_over(store: Store, client: Client) -> None:
    """A large result that comes too late is dropped, and what was set beside it is gone within a minute."""
    task = client.submit([1])
    claimed = store.claim(1)
    assert client.cancel(task)
    assert store.settle([done(one, LARGE) for one in claimed]) == {}
    assert client.status(task).state == "revoked"
    assert 0 < store.client.ttl(keys.beside(task)) <= keys.BESIDE_VOID_S
    assert not store.client.exists(store.inflight)
