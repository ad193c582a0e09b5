# SPDX-License-Identifier: Apache-2.0
"""The sync client against a real Redis; tasks are ended as a worker ends them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpuinfer.client.aio import AsyncClient
from gpuinfer.client.sync import Client
from gpuinfer.errors import (
    BrokerUnavailable,
    IdempotencyConflict,
    InputError,
    PayloadTooLarge,
    QueueFull,
    ShapeMismatch,
    TaskExpired,
    TaskNotFound,
    TaskRevoked,
    UnknownModel,
    WaitTimeout,
)
from gpuinfer.queue import keys
from gpuinfer.queue.message import decode
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import Settings
from tests.apis import WORKER, HandWorker
from tests.conftest import RedisFactory
from tests.services import RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def later(seconds: float, action: Callable[[], object]) -> threading.Timer:
    """Do something from another thread in a moment."""
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_submit_and_result(client: Client, worker: HandWorker) -> None:
    """A result comes when the task ends."""
    task_id = client.submit([1, 2])
    assert client.status(task_id).state == "queued"
    timer = later(0.2, lambda: worker.finish_all({"label": "2"}))
    assert client.result(task_id, 60) == {"label": "2"}
    timer.join()


def test_a_wait_that_has_heard_all_asks_nothing(
    client: Client, worker: HandWorker, redis_server: RedisServer
) -> None:
    """Who listened before a task was submitted need not look for its end, unless another wait has read it."""

    def looks() -> int:
        with redis_server.client() as admin:
            found: Any = admin.info("commandstats")
        return int(found.get("cmdstat_mget", {}).get("calls", 0))

    with redis_server.client() as admin:
        task_id = client.submit(1)
        worker.finish_all("first")
        assert client.result(task_id, 60) == "first"  # subscribes, then looks
        task_id = client.submit(2)
        worker.finish_all("second")
        before = looks()
        assert client.result(task_id, 60) == "second"
        assert looks() == before
        other = client.submit(3)
        task_id = client.submit(4)
        worker.finish_all("both")
        assert client.result(other, 60) == "both"  # has read the end of the fourth, and has dropped it
        assert client.result(task_id, 60) == "both"
        task_id = client.submit(5)
        worker.finish_all("cut off")
        admin.client_kill_filter(_type="pubsub")
        assert client.result(task_id, 60) == "cut off"
        task_id = client.submit(6)
        worker.finish_all("x" * 1_000_000)  # only a notice is told
        assert client.result(task_id, 60) == "x" * 1_000_000


def test_a_burst_keeps_its_order(client: Client, worker: HandWorker) -> None:
    """2,000 tasks in few round trips; ids in the order of inputs, and so are the results."""
    ids = client.submit_many(range(2000))
    assert len(set(ids)) == 2000
    claimed = worker.claim(2000)
    assert [decode(task.payload).id for task in claimed] == ids
    for task in claimed:
        worker.finish(task, decode(task.payload).body()[0][0] * 2)
    assert client.results(ids, 60) == [number * 2 for number in range(2000)]


def test_as_completed_yields_as_they_end(client: Client, worker: HandWorker) -> None:
    """The first to end comes first, whatever its place."""
    ids = client.submit_many([0, 1, 2])
    tasks = worker.claim(3)
    worker.finish(tasks[2], "third")
    ended = client.as_completed(ids, 60)
    assert next(ended).id == ids[2]
    worker.finish(tasks[0], "first")
    assert next(ended).id == ids[0]
    worker.finish(tasks[1], "second")
    assert [status.id for status in ended] == [ids[1]]


def test_errors_come_back_as_what_they_were(client: Client, worker: HandWorker) -> None:
    """Class, message and field survive; with return_errors they stand in their task's place."""
    ids = client.submit_many([0, 1])
    bad, good = worker.claim(2)
    worker.finish(bad, ShapeMismatch("must have shape [2]", "inputs"))
    worker.finish(good, None)
    with pytest.raises(ShapeMismatch) as caught:
        client.result(ids[0], 60)
    assert (caught.value.message, caught.value.field) == ("must have shape [2]", "inputs")
    error, result = client.results(ids, 60, return_errors=True)
    assert isinstance(error, ShapeMismatch)
    assert result is None


def test_expired_and_revoked(client: Client, worker: HandWorker) -> None:
    """Both are ends of their own kind, told apart."""
    expired, revoked = client.submit([1], expires_s=600), client.submit([2])
    assert client.cancel(revoked) is True
    first, second = worker.claim(2)
    worker.finish(first, TaskExpired("its time was over before a worker began it"))
    worker.finish(second, "too late")
    assert client.status(expired).state == "expired"
    assert client.status(revoked).state == "revoked"
    with pytest.raises(TaskExpired):
        client.result(expired, 60)
    with pytest.raises(TaskRevoked):
        client.result(revoked, 60)
    assert client.cancel(expired) is False


def test_a_cancelled_task_does_not_begin(client: Client, worker: HandWorker) -> None:
    """The worker is told at its last step before running."""
    task_id = client.submit([1])
    (task,) = worker.claim()
    assert client.cancel(task_id) is True
    assert worker.store.begin([(task.seq, task_id, b"{}")]) == {0}


def test_idempotency(client: Client, worker: HandWorker) -> None:
    """One key, one task; another request under it, or many tasks, are refused."""
    assert client.submit([1], idempotency_key="k") == client.submit([1], idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        client.submit([2], idempotency_key="k")
    assert len(worker.claim(10)) == 1
    with pytest.raises(InputError, match="one task"):
        client.submit_many([1, 2], idempotency_key="k")


def test_unknown_ids(client: Client, redis_server: RedisServer) -> None:
    """An id of one's own is told at once, another one's as well unless one is ready to wait so long."""
    gone = client.submit([1])
    redis_server.client().delete(keys.result(gone))
    began = time.monotonic()
    for call in (client.status, client.result, lambda it: client.result(it, 120)):
        with pytest.raises(TaskNotFound):
            call(gone)
    for call in (client.status, client.result, lambda it: client.result(it, 0)):
        with pytest.raises(TaskNotFound):
            call("nobody")
    assert time.monotonic() - began < 60
    with pytest.raises(TaskNotFound):
        client.result("nobody", 0.2)
    assert client.cancel(gone) is False


def plain(redis_server: RedisServer) -> str:
    """Append a task as a plain Celery producer does; return its id."""
    task = Submission(task="gpuinfer.predict", inputs=[1], queue="realtime")
    redis_server.client().lpush("realtime", task.encode())
    return task.id


def listened(redis_server: RedisServer, task_id: str) -> bool:
    """Tell whether somebody waits for a task by its id."""
    found: Any = redis_server.client().pubsub_numsub(keys.result(task_id))
    return bool(found[0][1])


def test_a_plain_producers_task(client: Client, worker: HandWorker, redis_server: RedisServer) -> None:
    """Nothing is known of it while it waits: it is waited for, and it can be cancelled."""
    awaited, cancelled = plain(redis_server), plain(redis_server)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.result, awaited, 60)
        wait_until(lambda: listened(redis_server, awaited), 60)
        assert client.cancel(cancelled) is True
        assert client.cancel(cancelled) is False
        with pytest.raises(TaskRevoked, match="it was unknown"):
            client.result(cancelled)
        tasks = worker.claim(9)
        assert worker.store.begin([(task.seq, decode(task.payload).id, b"") for task in tasks]) == {1}
        worker.finish(tasks[0], "done")
        assert waiting.result(60) == "done"


async def test_async_plain_producers_task(
    settings: Settings, worker: HandWorker, redis_server: RedisServer
) -> None:
    """As the sync client."""
    async with AsyncClient(settings) as client:
        awaited, cancelled = plain(redis_server), plain(redis_server)
        waiting = asyncio.ensure_future(client.result(awaited, 60))
        await asyncio.to_thread(wait_until, lambda: listened(redis_server, awaited), 60)
        assert await client.cancel(cancelled) is True
        with pytest.raises(TaskRevoked, match="it was unknown"):
            await client.result(cancelled)
        await asyncio.to_thread(worker.finish_all, "done")
        assert await waiting == "done"
        with pytest.raises(TaskNotFound):
            await client.result("nobody", 0.2)
        with pytest.raises(TaskNotFound):
            await client.result("nobody")


def test_the_time_to_wait(client: Client, worker: HandWorker) -> None:
    """WaitTimeout when it is over; a result that is there is returned even with no time at all."""
    task_id = client.submit([1])
    began = time.monotonic()
    with pytest.raises(WaitTimeout):
        client.result(task_id, 0.3)
    assert 0.25 < time.monotonic() - began < 60
    worker.finish_all("done")
    assert client.result(task_id, 0) == "done"


def test_what_cannot_be_sent(client: Client, settings_for: Callable[..., Settings]) -> None:
    """No JSON, or too large: refused before Redis sees it."""
    with pytest.raises(InputError, match="must be JSON"):
        client.submit({1, 2})
    with pytest.raises(PayloadTooLarge):
        client.submit("x" * 40_000_000)


def test_many_threads_share_a_client(client: Client, worker: HandWorker) -> None:
    """Waits of threads do not disturb each other."""
    ids = client.submit_many(range(20))
    with ThreadPoolExecutor(20) as pool:
        waits = [pool.submit(client.result, task_id, 60) for task_id in ids]
        for task in worker.claim(20):
            worker.finish(task, decode(task.payload).body()[0][0])
        assert [wait.result() for wait in waits] == list(range(20))


def test_a_wait_spans_a_restart_of_redis(
    redis_factory: RedisFactory, settings_for: Callable[..., Settings]
) -> None:
    """The waiter subscribes again and looks again."""
    server = redis_factory(appendonly="yes", appendfsync="always")
    with Client(settings_for(server)) as client:
        ids = client.submit_many([1, 2])
        with ThreadPoolExecutor(1) as pool, server.client() as connection:
            connection.config_resetstat()
            waiting = pool.submit(client.results, ids, 120)
            # It listens, then looks once; without an answer to the look it would be told that Redis is away.
            wait_until(lambda: "cmdstat_mget" in connection.info("commandstats"))
            server.kill()
            time.sleep(0.5)
            server.start()
            HandWorker(connection).finish_all("done")
            assert waiting.result() == ["done", "done"]


def test_without_redis(redis_server: RedisServer, client: Client) -> None:
    """A typed error, soon."""
    redis_server.kill()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        client.submit([1])
    with pytest.raises(BrokerUnavailable):
        client.status("x")
    with pytest.raises(WaitTimeout):
        client.result("x", 0.5)
    assert time.monotonic() - began < 60


def test_a_full_redis(redis_factory: RedisFactory, settings_for: Callable[..., Settings]) -> None:
    """QueueFull, for one and for many; what was accepted is all there."""
    server = redis_factory(maxmemory="4mb", maxmemory_policy="volatile-ttl")
    with Client(settings_for(server)) as client, server.client() as connection:
        accepted = []
        with pytest.raises(QueueFull):
            while True:
                accepted.append(client.submit("x" * 100_000))
        assert accepted
        claimed = [decode(task.payload).id for task in HandWorker(connection).claim(1000)]
        assert claimed == accepted
    server.client().flushall()
    with Client(settings_for(server)) as client, server.client() as connection:
        with pytest.raises(QueueFull) as refused:
            client.submit_many(["x" * 10_000] * 1000)
        claimed = [decode(task.payload).id for task in HandWorker(connection).claim(1000)]
        assert sorted(claimed) == sorted(refused.value.accepted)


def test_a_wrong_password_is_no_outage(
    redis_factory: RedisFactory, settings_for: Callable[..., Settings]
) -> None:
    """A wait says that Redis refuses the password; it would wait for ever."""
    server = redis_factory()
    with Client(settings_for(server)) as client:
        task_id = client.submit([1])
    server.client().config_set("requirepass", "right")
    with (
        Client(settings_for(server, broker={"password": "wrong"})) as client,
        pytest.raises(BrokerUnavailable, match="password"),
    ):
        client.result(task_id, timeout_s=60)


def test_wake_ups_do_not_pile_up(client: Client, worker: HandWorker) -> None:
    """An idle worker that does not come has one wake-up waiting, however much is submitted."""
    worker.register()
    assert worker.store.claim(1, state="idle") == []
    for _ in range(100):
        client.submit([1])
    assert worker.store.client.llen(keys.wake(WORKER)) == 1


# -- models -------------------------------------------------------------------------------


def test_unknown_models_are_refused(client: Client, worker: HandWorker) -> None:
    """By name, with those that are known; one task, many, or a list job. Nothing is queued."""
    worker.register()
    submits: list[Callable[[], object]] = [
        lambda: client.submit([1], model="resnet"),
        lambda: client.submit_many([[1], [2]], model="resnet"),
        lambda: client.submit_batch([[1], [2]], model="resnet"),
        lambda: client.submit([1], model="resnet", idempotency_key="k"),
    ]
    for submit in submits:
        with pytest.raises(UnknownModel, match="known: digits") as caught:
            submit()
        assert (caught.value.field, caught.value.http_status) == ("model", 404)
    assert worker.claim(10) == []
    assert client.submit([1], idempotency_key="k"), "a refused task holds no key"


def test_known_models_wait_for_a_worker(client: Client, redis_server: RedisServer) -> None:
    """A model that some worker has served is queued, though none lives; so is any name in a new fleet."""
    early = client.submit([0], model="other")
    with redis_server.client() as connection:
        HandWorker(connection, "digits", "resnet").register()
        later = client.submit([1], model="resnet")
        assert (client.status(early).state, client.status(later).state) == ("queued", "queued")
        worker = HandWorker(connection, "resnet", "other")
        assert worker.finish_all("done") + worker.finish_all("done") == 2
    assert client.results([early, later], 60) == ["done", "done"]
