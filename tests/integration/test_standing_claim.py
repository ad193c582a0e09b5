# SPDX-License-Identifier: Apache-2.0
"""The claim that waits in Redis: what it takes arrives once, or goes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.queue import keys
from gpuinfer.queue.epoch import SEQS_OF_AN_EPOCH
from gpuinfer.queue.store import Store
from gpuinfer.queue.transport import Channel
from gpuinfer.settings import Settings
from tests.claims import LONG_S, Taker, consuming, stand, store_of, taken, turn, unhurried, until
from tests.services import RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(redis_server)


@pytest.fixture(autouse=True)
def _unhurried() -> Iterator[None]:
    with unhurried():
        yield


@pytest.fixture
def taker(settings: Settings) -> Taker:
    return Taker(store_of(settings))


@pytest.fixture
def channel(taker: Taker, redis_server: RedisServer, settings: Settings) -> Iterator[Channel]:
    with consuming(redis_server.socket, taker, settings) as made:
        yield made


def test_a_task_comes_without_another_claim(
    channel: Channel, taker: Taker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has taken it before the worker knows; one after another, and no sequence id twice.

    The claim that puts this worker among the idle ones brings nothing.
    """
    called = []
    claim = Store.claim

    def note(*args: Any, **options: Any) -> Any:
        called.append(claim(*args, **options))
        return called[-1]

    monkeypatch.setattr(Store, "claim", note)
    submitted = []
    channel.brpop_timeout = LONG_S
    for _ in range(5):
        stand(channel)
        submitted.append(client.submit([1.0]))
        wait_until(lambda: taken(taker) == len(submitted))
        turn(channel, 60)
        assert taker.ids == submitted
    assert not any(called)
    assert len(taker.held()) == 5
    assert taker.tasks[0].noted_id == submitted[0]


def test_there_is_one_claim_at_a_time(channel: Channel, taker: Taker, client: Client) -> None:
    """While one stands another would use its sequence ids."""
    channel.brpop_timeout = LONG_S
    stand(channel)
    task = client.submit([1.0])
    assert channel.claim() == 0
    until(channel, lambda: taker.tasks)
    assert taker.ids == [task]


def test_a_wait_ends_and_begins_again(channel: Channel, taker: Taker, client: Client) -> None:
    """A BRPOP that is over brings nothing, and the next one brings what comes."""
    stand(channel)
    time.sleep(channel.brpop_timeout + 0.2)
    turn(channel, 1)
    task = client.submit([1.0])
    until(channel, lambda: taker.tasks)
    assert taker.ids == [task]


def test_a_producer_that_tells_nobody(channel: Channel, taker: Taker, client: Client) -> None:
    """The timer finds its task and ends the wait; for some seconds it looks after each batch, too."""
    channel.brpop_timeout = LONG_S
    stand(channel)
    assert not channel.silent
    client.submit([1.0])
    until(channel, lambda: taker.tasks)
    payload = taker.tasks.pop().payload
    stand(channel)
    taker.store.client.lpush(keys.list_key("default", 0), payload)
    turn(channel, 0.1)
    assert not taker.tasks
    channel.check_lists()
    assert channel.silent
    until(channel, lambda: taker.tasks)
    assert len(taker.tasks) == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_withdrawn_claim_takes_nothing(
    channel: Channel, taker: Taker, client: Client, *, late: bool
) -> None:
    """Neither afterwards, nor what it had taken when it was withdrawn."""
    if late:
        channel.brpop_timeout = LONG_S
    stand(channel)
    if late:
        client.submit([1.0])
        wait_until(lambda: taken(taker) == 1)
    channel.withdraw()
    assert not channel.ordered
    if not late:
        client.submit([1.0])
    taker.space = 0
    turn(channel, 1)
    waiting = taker.store.client.llen(keys.list_key("default", 0)) + taker.store.client.llen(
        keys.list_key("realtime", 0)
    )
    assert (taker.tasks, taken(taker), waiting) == ([], 0, 1)
    taker.space = 1
    until(channel, lambda: taker.tasks)
    assert len(taker.tasks) == 1


def test_an_epoch_that_ends_meanwhile(channel: Channel, taker: Taker, client: Client) -> None:
    """An idle worker whose sequence ids are used up begins another epoch, and waits on."""
    taker.store._seq = (taker.store._epoch.number + 1) * SEQS_OF_AN_EPOCH - 5
    channel.brpop_timeout = LONG_S
    stand(channel)
    task = client.submit([1.0])
    until(channel, lambda: taker.tasks)
    assert taker.ids == [task]


def cancel(channel: Channel, name: str) -> None:
    """Serve a queue no more."""
    for tag, queue in list(channel._tag_to_queue.items()):
        if queue == name:
            channel.basic_cancel(tag)


def test_a_queue_that_is_cancelled(channel: Channel, taker: Taker, client: Client) -> None:
    """Nothing is taken from it, not by a claim that stood before."""
    stand(channel)
    cancel(channel, "default")
    task = client.submit([1.0], queue="default")
    turn(channel, 1.2)
    turn(channel, 0.2)
    assert not taker.tasks
    other = client.submit([1.0], queue="realtime")
    until(channel, lambda: taker.tasks)
    assert taker.ids == [other]
    assert client.status(task).state == "queued"


def test_a_script_that_redis_has_forgotten(channel: Channel, taker: Taker, client: Client) -> None:
    """It is loaded again, and nothing is lost."""
    channel.brpop_timeout = LONG_S
    stand(channel)
    taker.store.client.script_flush()
    task = client.submit([1.0])
    until(channel, lambda: taker.tasks)
    assert taker.ids == [task]


def test_another_worker_of_this_name(
    channel: Channel, taker: Taker, client: Client, settings: Settings
) -> None:
    """It has begun to claim: this one ends, and has taken nothing."""
    stand(channel)
    other = store_of(settings)
    assert other.claim(1) == []
    client.submit([1.0])
    until(channel, lambda: taker.end is not None)
    assert not taker.tasks


def test_a_closed_channel_keeps_nothing(channel: Channel, taker: Taker, client: Client) -> None:
    """The end of a worker: withdrawn, then closed, while tasks arrive."""
    stand(channel)
    taker.space = 0
    channel.withdraw()
    client.submit([1.0])
    channel.close()
    assert (taker.tasks, taken(taker)) == ([], 0)


def counted(taker: Taker, command: str) -> int:
    """Return how often Redis was given a command."""
    return int(taker.store.client.info("commandstats")[f"cmdstat_{command}"]["calls"])


def test_a_finder_wakes_nobody_else(channel: Channel, taker: Taker, client: Client) -> None:
    """A task that nobody told of ends its finder's own wait; a list that is not served does not."""
    channel.brpop_timeout = LONG_S
    client.submit([1.0])
    until(channel, lambda: taker.tasks)
    payload = taker.tasks.pop().payload
    cancel(channel, "batch")
    stand(channel)
    client.submit([1.0], queue="batch")
    turn(channel)
    stand(channel)
    channel.check_lists()
    assert not channel.silent
    before = counted(taker, "lpush")
    taker.store.client.lpush("default", payload)
    channel.check_lists()
    until(channel, lambda: taker.tasks)
    assert len(taker.tasks) == 1
    assert counted(taker, "lpush") == before + 1


@pytest.mark.parametrize("how", ["refused", "unknown"])
def test_a_redis_that_ends_no_waits(
    channel: Channel, taker: Taker, client: Client, settings: Settings, how: str
) -> None:
    """An access list of before, or a proxy: the worker wakes itself instead, long before its wait is over."""
    channel.brpop_timeout = LONG_S
    client.submit([1.0])
    until(channel, lambda: taker.tasks)
    payload = taker.tasks.pop().payload
    stand(channel)
    if how == "refused":
        taker.store.client.acl_setuser("default", commands=["-client|unblock"])
    else:
        channel._wait._known = channel._wait._known[0], None
    for _ in range(2):
        stand(channel)
        taker.store.client.lpush("default", payload)
        channel.check_lists()
        until(channel, lambda: taker.tasks)
        assert len(taker.tasks) == 1
        taker.tasks.clear()
    assert len(taker.store.client.acl_log()) == int(how == "refused"), "asked once"
