# SPDX-License-Identifier: Apache-2.0
"""The claim that stands in Redis behind the bells: what it takes arrives once, or goes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import redis
from kombu import Connection, Queue

from gpuinfer import Client
from gpuinfer.errors import WorkerRunning
from gpuinfer.queue import keys, transport
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Claimed, Store
from gpuinfer.queue.transport import Channel
from gpuinfer.settings import QUEUES, Settings
from tests.services import RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration

NAME = "gpu0@here"


class Taker:
    """The batcher's part: keeps what it is given."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.space, self.idle = 10, True
        self.tasks: list[Claimed] = []
        self.end: WorkerRunning | None = None

    def room(self) -> tuple[int, int | None]:
        return self.space, None

    def receive(self, channel: Channel, tasks: Sequence[Claimed]) -> None:
        self.tasks += tasks

    def held(self) -> set[int]:
        return {task.seq for task in self.tasks}

    def fenced(self, error: WorkerRunning) -> None:
        self.end = error

    @property
    def ids(self) -> list[str]:
        return [decode(task.payload).id for task in self.tasks]


@pytest.fixture
def settings(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(redis_server)


@pytest.fixture
def taker(settings: Settings) -> Taker:
    return Taker(Store(connect(settings.broker, retries=0), NAME, QUEUES, settings.queue))


@pytest.fixture
def channel(taker: Taker, redis_server: RedisServer, settings: Settings) -> Iterator[Channel]:
    """A worker's channel on all queues; its first claim, which begins the life, has been made."""
    transport.register()
    options = {"worker": NAME, "queue_settings": settings.queue.model_dump()}
    url = f"gpuinfer+socket://{redis_server.socket}"
    with Connection(url, transport_options=options) as connection:
        made: Channel = connection.default_channel
        made.sink = taker
        queues = [Queue(name, routing_key=name) for name in QUEUES]
        with connection.Consumer(queues, channel=made, callbacks=[lambda *_: None]):
            made.claim()
            yield made


def turn(channel: Channel, timeout: float = 0.05) -> None:
    """Do what the event loop does once: send what is to be sent, and read what has come."""
    with suppress(TimeoutError):
        channel.connection.client.drain_events(timeout=timeout)


def stand(channel: Channel) -> None:
    """Send bells and claim, and see that they stand."""
    turn(channel)
    assert channel.ordered


def taken(taker: Taker) -> int:
    """Count what this worker has in flight."""
    return int(taker.store.client.hlen(taker.store.inflight)) // 2


def test_a_task_comes_without_another_claim(
    channel: Channel, taker: Taker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has taken it before the worker knows; one after another, and no sequence id twice."""

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("claimed by a call")

    monkeypatch.setattr(Store, "claim", refuse)
    submitted = []
    for _ in range(5):
        stand(channel)
        submitted.append(client.submit([1.0]))
        wait_until(lambda: taken(taker) == len(submitted))
        turn(channel)
        assert taker.ids == submitted
    assert len(taker.held()) == 5
    assert taker.tasks[0].noted_id == submitted[0]


def test_there_is_one_claim_at_a_time(channel: Channel, taker: Taker, client: Client) -> None:
    """While one stands another would use its sequence ids."""
    stand(channel)
    task = client.submit([1.0])
    assert channel.claim() == 0
    turn(channel, 1)
    assert taker.ids == [task]


def test_a_wait_ends_and_begins_again(channel: Channel, taker: Taker, client: Client) -> None:
    """A BRPOP that is over brings nothing, and the next one brings what comes."""
    stand(channel)
    time.sleep(channel.brpop_timeout + 0.2)
    turn(channel, 1)
    task = client.submit([1.0])
    turn(channel, 1)
    turn(channel, 1)
    assert taker.ids == [task]


def test_a_producer_that_does_not_ring(channel: Channel, taker: Taker, client: Client) -> None:
    """The timer finds its task and rings; for some seconds the end of a batch is a time to look, too."""
    stand(channel)
    assert not channel.silent
    client.submit([1.0])
    turn(channel, 1)
    payload = taker.tasks.pop().payload
    stand(channel)
    taker.store.client.lpush(keys.list_key("default", 0), payload)
    turn(channel, 0.1)
    assert not taker.tasks
    channel.look()
    assert channel.silent
    turn(channel, 1)
    assert len(taker.tasks) == 1


def test_a_lost_answer(
    channel: Channel, taker: Taker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks with tasks in the answer: they go back, and come by the next claim, once."""
    stand(channel)
    task = client.submit([1.0])
    wait_until(lambda: taken(taker) == 1)

    def broken(*_: object, **__: object) -> Any:
        raise redis.ConnectionError("Connection closed by server.")

    monkeypatch.setattr(channel.client.connection, "read_response", broken)
    with pytest.raises(redis.ConnectionError):
        turn(channel, 1)
    assert taker.store.unsure
    assert not taker.tasks
    assert channel.claim() == 1
    assert (taker.ids, taken(taker)) == ([task], 1)


@pytest.mark.parametrize("late", [False, True])
def test_a_withdrawn_claim_takes_nothing(
    channel: Channel, taker: Taker, client: Client, *, late: bool
) -> None:
    """Neither afterwards, nor what it had taken when it was withdrawn. The bell is passed on."""
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
    assert sum(taker.store.client.llen(keys.bell(name)) for name in QUEUES) >= 1
    taker.space = 1
    turn(channel, 1)
    turn(channel, 1)
    assert len(taker.tasks) == 1


def test_a_queue_that_is_cancelled(channel: Channel, taker: Taker, client: Client) -> None:
    """Nothing is taken from it, not by a claim that stood before."""
    stand(channel)
    for tag, queue in list(channel._tag_to_queue.items()):
        if queue == "default":
            channel.basic_cancel(tag)
    task = client.submit([1.0], queue="default")
    turn(channel, 1.2)
    turn(channel, 0.2)
    assert not taker.tasks
    other = client.submit([1.0], queue="realtime")
    turn(channel, 1.2)
    turn(channel, 0.2)
    assert taker.ids == [other]
    assert client.status(task).state == "queued"


def test_a_script_that_redis_has_forgotten(channel: Channel, taker: Taker, client: Client) -> None:
    """It is loaded again, and nothing is lost."""
    stand(channel)
    taker.store.client.script_flush()
    task = client.submit([1.0])
    turn(channel, 1)
    assert taker.ids == [task]


def test_another_worker_of_this_name(
    channel: Channel, taker: Taker, client: Client, settings: Settings
) -> None:
    """It has begun to claim: this one ends, and has taken nothing."""
    stand(channel)
    other = Store(connect(settings.broker, retries=0), NAME, QUEUES, settings.queue)
    assert other.claim(1) == []
    client.submit([1.0])
    turn(channel, 1)
    assert taker.end is not None
    assert not taker.tasks


def test_a_closed_channel_keeps_nothing(channel: Channel, taker: Taker, client: Client) -> None:
    """The end of a worker: withdrawn, then closed, while tasks arrive."""
    stand(channel)
    taker.space = 0
    channel.withdraw()
    client.submit([1.0])
    channel.close()
    assert (taker.tasks, taken(taker)) == ([], 0)
