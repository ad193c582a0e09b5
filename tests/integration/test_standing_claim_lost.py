# SPDX-License-Identifier: Apache-2.0
"""The claim that waits in Redis, when its answer does not come, or comes too late."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Queue

from gpuinfer import Client
from gpuinfer.queue import keys, waiting
from gpuinfer.queue.message import decode
from gpuinfer.queue.transport import Channel
from gpuinfer.settings import Settings
from tests.claims import LONG_S, NAME, Taker, Wire, consuming, stand, store_of, taken, turn, unhurried, until
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


def let_it_be_overdue(channel: Channel) -> None:
    """As if the wait should have been over for a while."""
    channel._wait._sent_at -= LONG_S + waiting.OVERDUE_S + 0.1


@pytest.fixture
def wire(tmp_path: Path, redis_server: RedisServer) -> Iterator[Wire]:
    with closing(Wire(tmp_path / "wire", redis_server.socket)) as made:
        yield made


def test_a_lost_answer(
    channel: Channel, taker: Taker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks with tasks in the answer: they go back, and come by the next claim, once."""
    channel.brpop_timeout = LONG_S
    stand(channel)
    task = client.submit([1.0])
    wait_until(lambda: taken(taker) == 1)

    def broken(*_: object, **__: object) -> Any:
        raise redis.ConnectionError("Connection closed by server.")

    monkeypatch.setattr(channel.client.connection, "read_response", broken)
    with pytest.raises(redis.ConnectionError):
        turn(channel, 60)
    assert taker.store.uncertain
    assert not taker.tasks
    assert channel.claim() == 1
    assert (taker.ids, taken(taker)) == ([task], 1)


def test_a_connection_that_is_dropped_unread(channel: Channel, taker: Taker, client: Client) -> None:
    """kombu drops one that was silent for long. What the claim took goes back; nothing is written over."""
    channel.brpop_timeout = LONG_S
    stand(channel)
    tasks = [client.submit([1.0])]
    wait_until(lambda: taken(taker) == 1)
    channel.client.connection.disconnect()
    assert not channel.ordered
    tasks.append(client.submit([2.0]))
    while len(taker.tasks) < 2:
        turn(channel)
        channel.check_lists()
    assert (taker.ids, taken(taker)) == (tasks, 2)


def test_a_connection_that_goes_silent(wire: Wire, taker: Taker, client: Client, settings: Settings) -> None:
    """The answer is not waited for much longer than the wait itself: what came in between comes by a call."""
    with consuming(wire.path, taker, settings) as channel:
        channel.brpop_timeout = LONG_S
        stand(channel)
        wire.cut()
        tasks = [client.submit([1.0])]
        wait_until(lambda: taken(taker) == 1)
        channel.check_lists()
        tasks.append(client.submit([2.0]))
        channel.check_lists()
        assert channel.ordered
        assert not taker.tasks
        let_it_be_overdue(channel)
        epoch = int(taker.store.client.hget(keys.epoch(NAME), "number") or 0)
        for _ in range(5):
            channel.check_lists()
        assert (taker.ids, taken(taker)) == (tasks, 2)
        assert int(taker.store.client.hget(keys.epoch(NAME), "number") or 0) == epoch + 1
        channel.client.connection.disconnect()
        tasks.append(client.submit([3.0]))
        until(channel, lambda: len(taker.tasks) == 3)
        assert taker.ids == tasks


def test_a_late_answer_of_a_busy_worker(channel: Channel, taker: Taker, client: Client) -> None:
    """It has come, and was not read for long: nothing is withdrawn."""
    channel.brpop_timeout = LONG_S
    stand(channel)
    task = client.submit([1.0])
    wait_until(lambda: taken(taker) == 1)
    let_it_be_overdue(channel)
    channel.check_lists()
    assert channel.ordered
    turn(channel, 60)
    assert taker.ids == [task]


def test_a_claim_that_outlives_its_worker(
    channel: Channel, taker: Taker, client: Client, settings: Settings
) -> None:
    """Redis has not heard of the death: what is put back is not taken by the dead."""
    its_s, channel.brpop_timeout = channel.brpop_timeout, LONG_S
    stand(channel)
    task = client.submit([1.0])
    until(channel, lambda: taker.tasks)
    channel.brpop_timeout = its_s
    stand(channel)
    dead, taker.tasks = taker.tasks, []
    after = store_of(settings)
    assert after.restore().ids == (task,)
    time.sleep(channel.brpop_timeout + 0.2)
    assert taken(taker) == 0
    assert [decode(one.payload).id for one in after.claim(5)] == [decode(one.payload).id for one in dead]


def test_a_doubt_whose_answer_is_lost(
    channel: Channel, taker: Taker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has begun the epoch that the worker does not know: its own claim is no other worker's."""
    stand(channel)
    count = taker.store._epoch._begin

    def lost(**arguments: Any) -> Any:
        count(**arguments)
        raise redis.ConnectionError("Connection closed by server.")

    with monkeypatch.context() as patch:
        patch.setattr(taker.store._epoch, "_begin", lost)
        channel.withdraw()
    task = client.submit([1.0])
    while not taker.tasks:
        turn(channel)
        channel.check_lists()
    assert taker.end is None
    assert taker.ids == [task]


def test_a_claim_withdrawn_in_doubt(channel: Channel, taker: Taker, client: Client) -> None:
    """A worker that drains while it does not know what it holds withdraws its claim all the same."""
    stand(channel)
    taker.store.mark_uncertain()
    taker.space = 0
    channel.withdraw()
    client.submit([1.0])
    channel.close()
    assert (taker.tasks, taken(taker)) == ([], 0)


def test_a_message_beside_a_claim_that_fails(channel: Channel, taker: Taker) -> None:
    """What a queue of kombu's own has brought is delivered, whatever becomes of the claim."""
    got: list[Any] = []
    other = Queue("other", routing_key="other")
    connection = channel.connection.client
    with connection.Consumer([other], channel=channel, callbacks=[lambda body, _: got.append(body)]):
        turn(channel)
        channel.brpop_timeout = LONG_S
        stand(channel)  # once that first wait is over: the next one is for this queue, too
        taker.store.client.set(keys.epoch(taker.store.worker), "no epoch")
        connection.Producer(channel).publish({"n": 1}, routing_key="other")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            turn(channel, 60)
        assert got == [{"n": 1}]
