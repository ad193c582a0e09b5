# SPDX-License-Identifier: Apache-2.0
"""What one caller may submit: how fast, and how much of it may wait, over all processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from redis.exceptions import ResponseError

from gpuinfer import Client
from gpuinfer.client import calls, submissions
from gpuinfer.client.aio import AsyncClient
from gpuinfer.errors import KeyQuota, RateLimited
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.options import Options
from gpuinfer.queue.quota import Quota
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, QueueSettings, Settings
from tests.contract.conftest import done, ids, on
from tests.contract.test_failed import failed

pytestmark = [pytest.mark.integration, on("redis-socket")]

IMAGE = np.zeros((3, 100, 100), np.float32)


async def send_all(
    client: AsyncClient, count: int, quota: Quota, caller: str = "alice", inputs: Any = 1, **options: Any
) -> list[Any]:
    """Submit tasks in one turn of the event loop; return each one's id, or error."""
    tasks = [
        await client.prepare(inputs, many=False, options=cast(Options, options), caller=caller, quota=quota)
        for _ in range(count)
    ]
    return list(await asyncio.gather(*map(client.send, tasks), return_exceptions=True))


def accepted(answers: list[Any]) -> list[str]:
    wrong = [one for one in answers if not isinstance(one, str | RateLimited | KeyQuota)]
    assert wrong == []
    return [one for one in answers if isinstance(one, str)]


async def test_a_burst_and_no_more(broker: BrokerSettings, store: Store) -> None:
    """Of one turn's tasks the first are taken, as many as there is room for; the others wait."""
    quota = Quota(rate=0.01, burst=5)
    async with AsyncClient(Settings(broker=broker)) as client:
        await send_all(client, 1, Quota())  # the first of a process makes another call before
        answers = await send_all(client, 12, quota)
        assert accepted(answers) == answers[:5]
        for error in answers[5:]:
            assert (error.code, error.http_status) == ("rate_limited", 429)
            assert 99 < error.retry_after_s <= 100
            assert 499 < error.reset_s <= 500
        assert len(accepted(await send_all(client, 1, Quota()))) == 1, "none is asked for"
        assert len(accepted(await send_all(client, 6, quota, "bob"))) == 5, "each has his own"
        assert client.refusals.counts == {("alice", "rate_limited"): 7, ("bob", "rate_limited"): 1}
    assert ids(store.claim(20))[1:6] == answers[:5]


async def test_what_is_left(broker: BrokerSettings, store: Store) -> None:
    """An accepted task tells how many more would be taken, and when the whole burst would."""
    quota = Quota(rate=0.001, burst=10)
    async with AsyncClient(Settings(broker=broker)) as client:
        task = await client.prepare(1, many=False, options={}, caller="alice", quota=quota)
        await client.send(task)
        assert task.rate is not None
        assert task.rate.remaining == 9
        assert 999 < task.rate.reset_s <= 1000
        keyed: Options = {"idempotency_key": "k"}
        for _ in range(2):  # one that is there already counts, too
            task = await client.prepare(1, many=False, options=keyed, caller="alice", quota=quota)
            await client.send(task)
        assert task.rate is not None
        assert task.rate.remaining == 7
        free = await client.prepare(1, many=False, options={}, caller="alice")
        await client.send(free)
        assert free.rate is None


async def test_it_comes_back_at_its_rate(broker: BrokerSettings, store: Store) -> None:
    """When the time that was told is over, and not before: by Redis's own note, without a wait."""
    quota = Quota(rate=0.001, burst=2)
    async with AsyncClient(Settings(broker=broker)) as client:
        assert len(accepted(await send_all(client, 3, quota))) == 2

        def pass_time(seconds: float) -> None:
            due = float(store.client.hget(keys.RATES, "alice") or 0)
            store.client.hset(keys.RATES, "alice", repr(due - seconds))

        (error,) = await send_all(client, 1, quota)
        pass_time(error.retry_after_s - 100)
        (error,) = await send_all(client, 1, quota)
        assert isinstance(error, RateLimited)
        pass_time(error.retry_after_s)
        assert len(accepted(await send_all(client, 2, quota))) == 1
        pass_time(-1e6)  # a clock that was set back locks nobody out for longer than a burst
        (error,) = await send_all(client, 1, quota)
        assert error.retry_after_s <= 1000


async def test_a_refused_body_is_dropped(broker: BrokerSettings, store: Store) -> None:
    """What is refused leaves nothing behind, and what is accepted runs."""
    async with AsyncClient(Settings(broker=broker)) as client:
        answers = await send_all(client, 4, Quota(rate=0.01, burst=2), inputs=IMAGE)
        there = sorted(keys.body(one).encode() for one in accepted(answers))
        assert len(there) == 2
        assert sorted(store.client.scan_iter(f"{keys.BODY_PREFIX}*")) == there
        size = int(store.client.hget(keys.BODY_BYTES, "realtime") or 0)
        assert int(store.client.hget(keys.BODY_BYTES, "@alice") or 0) == size > 200_000
    tasks = store.claim(4)
    store.settle([done(task) for task in tasks])
    assert store.client.hget(keys.BODY_BYTES, "@alice") is None
    assert store.client.hlen(keys.BODIES) == 0


async def test_so_many_may_wait(broker: BrokerSettings, store: Store) -> None:
    """Of one caller, in whatever lists and for whatever time; what is claimed makes room."""
    quota = Quota(max_waiting=10)
    async with AsyncClient(Settings(broker=broker)) as client:
        for options in ({}, {"priority": 9}, {"queue": "batch"}, {"countdown_s": 1000}):
            assert len(accepted(await send_all(client, 2, quota, **options))) == 2
        answers = await send_all(client, 5, quota)
        assert accepted(answers) == answers[:2]
        assert (answers[2].code, answers[2].http_status) == ("key_quota", 429)
        assert "10 tasks" in str(answers[2])
        assert len(accepted(await send_all(client, 20, quota, "bob"))) == 10
        assert len(accepted(await send_all(client, 20, Quota(), "carol"))) == 20
        mine = [task for task in store.claim(60) if keys.place_of(task.list_key).caller == "alice"]
        assert len(mine) == 8
        assert len(accepted(await send_all(client, 30, quota))) == 8
        assert len(accepted(await send_all(client, 1, quota))) == 0


async def test_so_many_bytes_may_wait(broker: BrokerSettings, store: Store) -> None:
    """With the large bodies of what waits and runs."""
    quota = Quota(max_waiting_bytes=400_000)
    async with AsyncClient(Settings(broker=broker)) as client:
        answers = await send_all(client, 5, quota, inputs=IMAGE)  # 120 kB each
        assert len(accepted(answers)) == 3
        assert "400000 bytes" in str(answers[-1])
        assert len(accepted(await send_all(client, 5, quota, "bob", inputs=IMAGE))) == 3
        store.settle([done(task) for task in store.claim(6)])
        assert len(accepted(await send_all(client, 5, quota, inputs=IMAGE))) == 3


async def test_nothing_counts_that_is_not_there(broker: BrokerSettings, store: Store) -> None:
    """No counter goes up and down: when a list was emptied behind our backs, there is room."""
    quota = Quota(max_waiting=4)
    async with AsyncClient(Settings(broker=broker)) as client:
        for _ in range(3):
            assert len(accepted(await send_all(client, 9, quota))) == 4
            store.client.delete("realtime@alice")


def now(client: Any) -> float:
    seconds, micros = client.time()
    return float(seconds + micros / 1e6)


def flood(broker: BrokerSettings, quota: Quota, begin: Any, found: Any) -> None:
    """Submit for five seconds of Redis's; put when that was tried, and how many tasks were accepted."""
    client = connect(broker)
    script, settings = bind(client, "submit"), QueueSettings(max_waiting=10**7)
    begin.wait()
    times, count = [now(client)], 0
    while times[-1] - times[0] < 5:
        # All that may come at once: one process alone gets the whole rate, however seldom it is run.
        tasks = [
            submissions.build(1, many=False, caller="alice", quota=quota, model="digits") for _ in range(20)
        ]
        (call,) = calls.bulk(tasks, settings)
        while call.ids:
            try:
                script(args=call.args)
            except ResponseError as exc:
                fits = calls.fitting(exc)
                assert fits is not None
                call = call.first(fits)
            else:
                count += len(call.ids)
                break
        times.append(now(client))
        time.sleep(0.002)  # two cores have better to do than to be refused
    found.put((times, count))


def test_a_rate_over_processes(broker: BrokerSettings, store: Store) -> None:
    """Three processes that submit more than they may get one rate together, within 5 %, by Redis's clock.

    What was not asked for while the machine ran none of them is lost to them: that time does not count.
    """
    quota = Quota(rate=200, burst=20)
    context = multiprocessing.get_context("spawn")
    begin, found = context.Event(), context.Queue()
    floods = [context.Process(target=flood, args=(broker, quota, begin, found)) for _ in range(3)]
    for process in floods:
        process.start()
    begin.set()
    told = [found.get(timeout=120) for _ in floods]
    for process in floods:
        process.join(60)
    times = sorted(at for tried, _ in told for at in tried)
    stalls = [later - at for at, later in pairwise(times)]
    took, total = times[-1] - times[0], sum(count for _, count in told)
    idle = sum(stall for stall in stalls if stall > quota.at_once / quota.rate / 2)
    assert 0.95 * quota.rate * (took - idle) <= total <= 1.05 * quota.rate * took
    assert store.client.llen("realtime@alice") == total


@pytest.mark.parametrize(
    ("quota", "error"),
    [
        (Quota(rate=0.001, burst=2), RateLimited),
        (Quota(max_waiting=2), KeyQuota),
        (Quota(max_waiting_bytes=100_000), KeyQuota),
    ],
)
async def test_what_is_sent_again_counts(
    broker: BrokerSettings, store: Store, quota: Quota, error: type[Exception]
) -> None:
    """Else who is held to a rate could send what has failed as often as he likes. What is refused stays."""
    async with AsyncClient(Settings(broker=broker)) as client:
        sent = accepted(await send_all(client, 3, Quota(), inputs=IMAGE))
        store.settle([failed(task) for task in store.claim(3)])
        for task_id in sent[: 2 if quota.max_waiting_bytes == 0 else 0]:
            await client.retry(task_id, only="alice", quota=quota)
        with pytest.raises(error):
            await client.retry(sent[2], only="alice", quota=quota)
        assert client.refusals.counts.total() == 1
        assert (await client.status(sent[2])).state == "failed"
        with Client(Settings(broker=broker)) as other, pytest.raises(error):
            other.retry(sent[2], only="alice", quota=quota)
        await client.retry(sent[2])  # an administrator
        assert (await client.status(sent[2])).state == "queued"
