# SPDX-License-Identifier: Apache-2.0
"""The two drivers side by side: one call a turn, one packet, and waits that garbage does not deafen."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable

import pytest
import redis

from gpuinfer import AsyncClient, Client
from gpuinfer.errors import BrokerRefused, InputError, PayloadTooLarge, UnknownModel
from gpuinfer.queue import keys
from gpuinfer.queue.message import decode
from gpuinfer.settings import Settings
from tests.apis import HandWorker
from tests.services import RedisServer

pytestmark = pytest.mark.integration

VERBS = (
    *("submit", "submit_batch", "submit_many", "wait", "result", "results"),
    *("as_completed", "status", "cancel"),
    *("place", "task", "tasks", "retry", "forget"),
)
#: What the front asks for beside: a submission in parts, what it tells of the fleet, and keys.
FRONT_ALONE = {
    *("aclose", "prepare", "send", "watch", "ended"),
    *("ping", "fleet", "takes", "capacity", "claimed", "queues", "workers"),
    *("account", "usage", "weigh", "known_model"),
}
#: What anybody may publish: no JSON, no list, no tasks, a task without a state, a bomb of brackets.
GARBAGE = (
    b"\xff",
    b"{",
    b"3",
    b"[3]",
    b'[{"status": "SUCCESS"}]',
    b"null",
    b'[{"task_id": {}}]',
    b"[" * 100_000,
)


@pytest.fixture
def settings(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Settings:
    """Settings that point at this test's Redis."""
    return settings_for(redis_server, queue={"max_payload_bytes": 100_000})


def calls(admin: redis.Redis, command: str = "evalsha") -> int:
    """Return how often Redis was called so."""
    return int(admin.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def test_both_drivers_have_the_same_verbs() -> None:
    """Their signatures differ in nothing but what is awaited."""
    for verb in VERBS:
        ours, later = (inspect.signature(getattr(cls, verb)) for cls in (Client, AsyncClient))
        assert ours.parameters == later.parameters, verb
    public = [
        {name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}
        for cls in (Client, AsyncClient)
    ]
    assert public[0] - {"close"} == public[1] - FRONT_ALONE == set(VERBS)


async def test_a_turn_of_the_loop_is_one_call(settings: Settings, worker: HandWorker) -> None:
    """300 submissions at once are one call of the script for each list, and their order is kept."""
    worker.register()
    admin = worker.store.client
    async with AsyncClient(settings) as client:
        await client.submit([0])
        await asyncio.sleep(0)
        before = calls(admin)
        ids = await asyncio.gather(*(client.submit([number]) for number in range(300)))
        assert calls(admin) - before == 1
        urgent = await asyncio.gather(*(client.submit([number], priority=number % 3) for number in range(30)))
        assert calls(admin) - before == 4
        keyed = await asyncio.gather(*(client.submit([1], idempotency_key="k") for _ in range(10)))
        assert len(set(keyed)) == 1
    claimed = [decode(task.payload).id for task in worker.claim(1000)]
    assert [one for one in claimed if one in ids] == ids
    assert {*urgent, *keyed} <= {*claimed}


async def test_one_that_is_refused_is_alone_in_it(settings: Settings, worker: HandWorker) -> None:
    """What the others submit in the same turn is accepted."""
    worker.register()
    async with AsyncClient(settings) as client:
        outcomes = await asyncio.gather(
            client.submit([1]),
            client.submit("x" * 200_000),
            client.submit([2], model="nobody"),
            client.submit([3], priority=11),
            client.submit([4]),
            return_exceptions=True,
        )
        assert [type(one) for one in outcomes] == [str, PayloadTooLarge, UnknownModel, InputError, str]
        assert len(worker.claim(10)) == 2


async def test_a_caller_that_leaves_takes_nobody_along(settings: Settings, worker: HandWorker) -> None:
    """A submission that is cancelled in the turn of others leaves theirs alone."""
    async with AsyncClient(settings) as client:
        one, other = (asyncio.ensure_future(client.submit([number])) for number in range(2))
        await asyncio.sleep(0)
        one.cancel()
        assert await other
        with pytest.raises(asyncio.CancelledError):
            await one
        assert await client.status(await other)


async def test_lost_connections_lose_and_double_nothing(settings: Settings, worker: HandWorker) -> None:
    """Redis closes them all, again and again, while a client submits."""
    worker.register()
    admin = worker.store.client
    async with AsyncClient(settings) as client:
        for number in range(20):
            submitting = asyncio.gather(*(client.submit([number]) for _ in range(20)))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            await asyncio.to_thread(admin.client_kill_filter, _type="normal", skipme=True)
            assert len(set(await submitting)) == 20
    assert len(worker.claim(1000)) == 400


async def test_lost_subscriptions_deafen_nobody(settings: Settings, worker: HandWorker) -> None:
    """Redis closes them again and again, while waits for one's own and others' tasks begin and end."""
    worker.register()
    admin = worker.store.client
    async with AsyncClient(settings) as client, AsyncClient(settings) as other:
        for number in range(40):
            ids = await client.submit_many(range(3)) + await other.submit_many(range(3))
            waits = []
            for task_id in ids:
                waits.append(asyncio.ensure_future(client.result(task_id, 60)))
                for _ in range(number % 8):
                    await asyncio.sleep(0)
                await asyncio.to_thread(admin.client_kill_filter, _type="pubsub")
            await asyncio.to_thread(worker.finish_all, "done")
            assert await asyncio.gather(*waits) == ["done"] * 6


async def test_a_wait_without_the_right_to_listen(
    redis_server: RedisServer, settings_for: Callable[..., Settings], worker: HandWorker
) -> None:
    """It is told which right is missing, and does not wait for ever; the next wait tries again."""
    admin = worker.store.client
    user = {"username": "deaf", "password": "secret"}
    admin.acl_setuser("deaf", enabled=True, passwords=["+secret"], keys="*", commands=["+@all"])
    async with AsyncClient(settings_for(redis_server, broker=user)) as client:
        task_id = await client.submit([1])
        for _ in range(2):
            with pytest.raises(BrokerRefused, match="deaf lacks the right to a channel"):
                await client.result(task_id, 60)
        admin.acl_setuser("deaf", enabled=True, channels="*")
        waiting = asyncio.ensure_future(client.result(task_id, 60))
        while not admin.pubsub_channels():
            await asyncio.sleep(0.01)
        worker.finish_all("done")
        assert await waiting == "done"


async def test_garbage_deafens_no_asyncio_waiter(
    settings: Settings, worker: HandWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """Published on the reply channel and on an id's own: everybody still hears of his task's end."""
    admin = worker.store.client
    async with AsyncClient(settings) as client, AsyncClient(settings) as other:
        ids = await client.submit_many(range(5))
        waits = [asyncio.ensure_future(who.result(one, 60)) for who in (client, other) for one in ids]
        channels = [client._origin.channel, keys.result(ids[0])]
        while any(count == 0 for _, count in admin.pubsub_numsub(*channels)):
            await asyncio.sleep(0.01)
        with caplog.at_level(logging.WARNING, "gpuinfer"):
            for garbage in GARBAGE:
                assert all(admin.publish(channel, garbage) for channel in channels)
            while sum("Unreadable publication" in line for line in caplog.messages) < len(GARBAGE):
                await asyncio.sleep(0.01)
        assert all(len(line) < 300 for line in caplog.messages)
        worker.finish_all("done")
        assert await asyncio.gather(*waits) == ["done"] * 10


def test_garbage_deafens_no_waiter(settings: Settings, worker: HandWorker) -> None:
    """The same in the other driver."""
    admin = worker.store.client
    with Client(settings) as client, Client(settings) as other:
        ids = client.submit_many(range(5))
        for who in (client, other):
            ending = who.as_completed(ids, 60)
            worker.finish(worker.claim(1)[0], "first")
            assert next(ending).result == "first"
            channel = client._origin.channel if who is client else keys.result(ids[4])
            assert all(admin.publish(channel, garbage) for garbage in GARBAGE)
            worker.finish(worker.claim(1)[0], "second")
            assert next(ending).result in ("first", "second")
            ending.close()  # type: ignore[attr-defined]  # it is a generator
        worker.finish_all("done")
        assert len(client.results(ids, 60)) == len(other.results(ids, 60)) == 5


@pytest.mark.parametrize("verb", ["status", "wait", "result", "cancel"])
async def test_an_id_that_is_none_of_ours(verb: str, settings: Settings) -> None:
    """Longer than any id that we make or take: told at once, and by name."""
    with Client(settings) as client:
        for wrong in ("x" * 201, "", 5):
            with pytest.raises(InputError, match="1 to 200 characters") as caught:
                getattr(client, verb)(wrong)
            assert (caught.value.field, caught.value.http_status) == ("task_id", 422)
        with pytest.raises(InputError):
            client.results(["x" * 201])
    async with AsyncClient(settings) as later:
        with pytest.raises(InputError, match="1 to 200 characters"):
            await getattr(later, verb)("x" * 201)
        with pytest.raises(InputError):
            await later.results(["x" * 201])


async def test_a_wait_tells_the_state_when_its_time_is_over(settings: Settings, worker: HandWorker) -> None:
    """Both drivers: queued, then completed."""
    async with AsyncClient(settings) as later:
        with Client(settings) as client:
            task_id = client.submit([1])
            for timeout_s in (0, 0.1):
                assert client.wait(task_id, timeout_s).state == "queued"
                assert (await later.wait(task_id, timeout_s)).state == "queued"
            worker.finish_all("done")
            assert client.wait(task_id, 60).result == (await later.wait(task_id, 60)).result == "done"
