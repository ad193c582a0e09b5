# SPDX-License-Identifier: Apache-2.0
"""What may wait is bounded: by number and by bytes, for our clients at once, and without a trace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gpuinfer import AsyncClient, Client
from gpuinfer.client import calls, submissions
from gpuinfer.client.origin import Origin
from gpuinfer.errors import QueueFull
from gpuinfer.queue import keys
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, QueueSettings, Settings
from tests.contract.conftest import commands, done, ids, message, on
from tests.workers import wait_until

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-socket")]

Make = Callable[..., Client]


@pytest.fixture
def limited(broker: BrokerSettings, store: Store) -> Iterator[Make]:
    """Make clients with bounds of their own; there is a worker that serves."""
    opened: list[Client] = []

    def make(**queue: object) -> Client:
        opened.append(Client(Settings(broker=broker, queue=QueueSettings.model_validate(queue))))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


def everything(store: Store) -> dict[bytes, int]:
    """Return all keys except the account of what may come, and their sizes."""
    names = set(store.client.scan_iter("*")) - {keys.ROOM.encode()}
    return {name: int(store.client.memory_usage(name, samples=0) or 0) for name in names}


def fill(client: Client, inputs: object = 1, **options: object) -> int:
    """Submit until it is refused; return how many tasks were accepted."""
    for accepted in range(10_000):
        try:
            client.submit(inputs, **options)  # type: ignore[arg-type]
        except QueueFull as exc:
            assert exc.http_status == 429
            return accepted
    raise AssertionError("it was never full")


def test_so_many_tasks(store: Store, limited: Make) -> None:
    """Exactly as many as are set, over all tiers and models; one leaves, and one may come."""
    client = limited(max_waiting=50)
    store.register()
    client.submit_many([1] * 20, queue="batch", priority=3)
    assert fill(client) == 30
    before = everything(store)
    for submit in (
        lambda: client.submit(1, idempotency_key="k"),
        lambda: client.submit_many([1, 2], queue="default"),
        lambda: client.submit("x" * 100_000),
    ):
        with pytest.raises(QueueFull, match="max_waiting is 50"):
            submit()
    assert everything(store) == before
    (task,) = store.claim(1)
    assert fill(client) == 1
    store.release([task.seq])
    assert fill(client) == 0


def test_many_at_once(store: Store, limited: Make) -> None:
    """Calls of a bulk are accepted one by one: what was accepted before is told."""
    client = limited(max_waiting=700)
    with pytest.raises(QueueFull) as caught:
        client.submit_many(range(2000))
    assert len(caught.value.accepted) == 500
    assert ids(store.claim(1000)) == list(caught.value.accepted)


@pytest.mark.parametrize("countdown_s", [None, 60])
def test_many_of_one_turn(
    broker: BrokerSettings, store: Store, limited: Make, countdown_s: float | None
) -> None:
    """Of what asyncio submits in one call, as much goes in as fits, the first first; the rest is told so."""
    limited(max_waiting=23).submit_many([1] * 3)
    sent, calls_made = asyncio.run(
        at_once(broker, store, [1] * 100, max_waiting=23, max_later=20, countdown_s=countdown_s)
    )
    accepted = [one for one in sent if isinstance(one, str)]
    assert sent[:20] == accepted
    assert all(isinstance(one, QueueFull) for one in sent[20:])
    assert calls_made < 20
    if countdown_s is None:
        assert ids(store.claim(100))[3:] == accepted
    else:
        assert store.client.zcard(keys.later("realtime")) == 20


def test_sizes_of_one_turn(broker: BrokerSettings, store: Store) -> None:
    """What is too large for what is left keeps nothing out that fits."""
    large, small = "x" * 30_000, 1
    inputs = [small, large, small, *[large] * 9, small, small]
    sent, _ = asyncio.run(at_once(broker, store, inputs, max_waiting_bytes=150_000))
    assert [
        one for one, value in zip(sent, inputs, strict=True) if value == small and not isinstance(one, str)
    ] == []
    assert sum(isinstance(one, str) for one in sent) in (7, 8)
    assert ids(store.claim(100)) == [one for one in sent if isinstance(one, str)]
    assert not list(store.client.scan_iter(f"{keys.BODY_PREFIX}*"))


async def at_once(
    broker: BrokerSettings,
    store: Store,
    inputs: Sequence[object],
    countdown_s: float | None = None,
    **queue: int,
) -> tuple[list[object], int]:
    """Submit in one turn of the event loop; return ids and errors, and how many calls that took."""
    chosen = Settings(broker=broker, queue=QueueSettings.model_validate(queue))
    async with AsyncClient(chosen) as client:
        store.client.config_resetstat()
        sent = await asyncio.gather(
            *(client.submit(value, countdown_s=countdown_s) for value in inputs), return_exceptions=True
        )
        return list(sent), commands(store, "evalsha")


def test_plain_producers_count(store: Store, limited: Make) -> None:
    """They are never refused, and they count, told or untold."""
    store.client.lpush("default", *[message()] * 8)
    store.client.lpush("realtime.digits\x06\x163", *[message()] * 8)
    assert fill(limited(max_waiting=20)) == 4
    store.client.lpush("realtime", *[message()] * 8)
    assert len(store.claim(100, search=True)) == 28


def test_what_has_left_makes_room(store: Store, limited: Make) -> None:
    """Whatever has happened to the lists meanwhile: claimed, deleted, pushed."""
    client = limited(max_waiting=100)
    for _ in range(5):
        assert fill(client) == 100
        store.settle([done(task) for task in store.claim(100)])
    assert fill(client) == 100
    store.client.delete("realtime")
    assert fill(client) == 100


def test_so_many_bytes(store: Store, limited: Make) -> None:
    """Messages and bodies beside the lists, until they have ended; the tier batch has half of it."""
    client = limited(max_waiting_bytes=8_000_000)
    large = "x" * 400_000
    in_batch = fill(client, large, queue="batch")
    assert 8 <= in_batch <= 10
    fill(client, "x" * 40_000, queue="batch")
    fill(client, "x" * 4000, queue="batch")
    with pytest.raises(QueueFull, match="batch"):
        client.submit("x" * 50_000, queue="batch")
    rest = fill(client, "x" * 40_000) + fill(client, "x" * 4000) + fill(client, large)
    assert rest >= 90
    waiting = sum(everything(store)[key] for key in (b"realtime", b"batch"))
    bodies = sum(map(int, store.client.hvals(keys.BODY_BYTES)))
    assert 7_900_000 < waiting + bodies < 8_010_000  # a list's nodes are not the message's bytes
    while tasks := store.claim(20):
        store.settle([done(task) for task in tasks])
    assert fill(client, large, queue="batch") == in_batch


def test_half_of_the_memory(store: Store, limited: Make) -> None:
    """Unless bytes are set: a full queue leaves room for what workers write."""
    store.client.config_set("maxmemory", 16_000_000)
    store.client.config_set("maxmemory-policy", "volatile-ttl")
    accepted = fill(limited(), "x" * 100_000)
    assert 70 <= accepted <= 80
    assert store.client.info("stats")["evicted_keys"] == 0


def test_other_bounds_count_at_once(store: Store, limited: Make) -> None:
    """A client with lower bounds does not live on what another one was granted."""
    limited(max_waiting=1000).submit_many([1] * 10)
    assert fill(limited(max_waiting=12)) == 2


@pytest.mark.parametrize(("old", "new"), [(60_000, 1000), (1000, 60_000)], ids=["small last", "large last"])
def test_sizes_that_differ(store: Store, limited: Make, old: int, new: int) -> None:
    """What came last says nothing of what waits behind it."""
    store.client.lpush("realtime", *["x" * old] * (3_000_000 // old))
    store.client.lpush("realtime", *["x" * new] * 6)
    assert fill(limited(max_waiting_bytes=4_000_000), "x" * 10_000) in range(30, 101)


def test_what_waits_for_its_time_has_bytes_too(store: Store, limited: Make) -> None:
    """A countdown is no way round the bound."""
    assert fill(limited(max_waiting_bytes=200_000), "x" * 30_000, countdown_s=60) <= 6


def test_a_long_refusal_is_remembered_for_a_moment(store: Store, limited: Make) -> None:
    """Where a count takes long the next are refused without one; room that comes is found."""
    client = limited(max_waiting_bytes=20_000_000)
    store.client.lpush("default", *["x" * 1_000_000] * 20)
    assert fill(client) == 0
    raw: Any = store.client
    before = raw.info("commandstats")["cmdstat_memory|usage"]["calls"]
    assert fill(client) == 0
    assert raw.info("commandstats")["cmdstat_memory|usage"]["calls"] == before
    raw.delete("default")
    wait_until(lambda: fill(client, "x" * 5_000_000) > 0)


def test_a_call_that_is_repeated_is_not_refused(store: Store, limited: Make) -> None:
    """The answer was lost, and meanwhile nothing more may come: what was accepted keeps its body."""
    client = limited(max_waiting=1)
    task = submissions.build("x" * 100_000, many=False, origin=Origin())
    call = calls.one(task, client._settings.queue)
    for _ in range(2):
        (answer,) = client._call([call])
        assert answer == task.id.encode()
    assert store.client.exists(*call.bodies) == 1
    assert store.client.llen("realtime") == 1
