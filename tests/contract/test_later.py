# SPDX-License-Identifier: Apache-2.0
"""The contract of tasks with an ETA: they wait in Redis, and come back when they are due by its clock."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import redis

from gpuinfer import Client
from gpuinfer.client.aio import AsyncClient
from gpuinfer.errors import InputError, QueueFull
from gpuinfer.queue import keys
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.depth import Lane
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.later import move_due
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, QueueSettings, Settings
from tests.contract.conftest import begin, ids, on, send, store_of

pytestmark = [pytest.mark.integration, on("redis-socket")]

#: Seconds from the test's clock to what will not come while it runs.
AHEAD_S = 3600.0


def postpone(store: Store, tasks: list[Claimed], due: float | None = None) -> Any:
    at = time.time() + AHEAD_S if due is None else due
    return store.postpone([(task.seq, at + place / 1000) for place, task in enumerate(tasks)])


def let_come(store: Store, by_s: float = 2 * AHEAD_S) -> None:
    """Let so much time pass for what waits."""
    raw: Any = store.client
    for list_key in raw.zrange(keys.LATER, 0, -1):
        waiting = raw.zrange(keys.later(list_key.decode()), 0, -1, withscores=True)
        raw.zadd(keys.later(list_key.decode()), {payload: due - by_s for payload, due in waiting})
        raw.zadd(keys.LATER, {list_key: waiting[0][1] - by_s})
    first = raw.zrange(keys.LATER, 0, 0, withscores=True)
    raw.set(keys.DUE, first[0][1])


def traces(store: Store) -> list[bytes]:
    """Return what there is of tasks that wait for their ETA."""
    raw: Any = store.client
    return sorted(raw.keys("gpuinfer:later*") + raw.keys("gpuinfer:due"))


def test_a_task_waits_in_redis_until_it_is_due(store: Store) -> None:
    """It is not in flight meanwhile, no delivery is counted, and nothing is left when it has come."""
    wanted = send(store, 3)
    held = store.claim(3)
    answer = postpone(store, held[1:])
    assert (answer.due, answer.refused) == (frozenset(), frozenset())
    assert store._seqs_in_flight() == [held[0].seq]
    assert store.client.hlen(store.inflight) == 2
    assert not store.waits()
    assert store.claim(9) == []
    let_come(store)
    assert not store.waits()  # what is due was moved on the way, and an idle worker was woken
    again = store.claim(9)
    assert ids(again) == wanted[1:]
    assert {decode(task.payload).deliveries for task in again} == {0}
    assert traces(store) == []
    counts: Any = store.client.hgetall(keys.CLAIMED)
    assert counts == {b"realtime digits": b"3"}


def test_the_clock_is_redis(store: Store) -> None:
    """What is due by Redis's clock stays in flight, and is said to be."""
    send(store, 2)
    held = store.claim(2)
    answer = store.postpone([(held[0].seq, time.time() - 1), (held[1].seq, time.time() + AHEAD_S)])
    assert answer.due == {0}
    assert store.client.hexists(store.inflight, str(held[0].seq))
    assert not store.client.hexists(store.inflight, str(held[1].seq))


def test_they_come_in_the_order_of_their_time(store: Store) -> None:
    """From several lists, more than one call moves; each list's tasks stand in the order of their ETAs."""
    wanted = send(store, 2500)
    held: list[Claimed] = []
    while len(held) < 2500:
        held += store.claim(500)
    other = send(store, 1, queue="batch")
    (last,) = store.claim(1)
    base = time.time() + AHEAD_S
    store.postpone([(task.seq, base - place) for place, task in enumerate(held)])
    postpone(store, [last])
    let_come(store)
    counts = []
    while count := move_due(store.client):
        counts.append(count)
    assert sum(counts) == 2501
    assert max(counts) <= 1000
    back: list[Claimed] = []
    while len(back) < 2501:
        back += store.claim(500)
    assert ids(back) == [*reversed(wanted), *other]
    assert traces(store) == []


def test_a_bound(broker: BrokerSettings) -> None:
    """One more than queue.max_later is refused, by a sentence that names the setting; it stays in flight."""
    store = store_of(broker)
    store._later._settings = QueueSettings(max_later=2)
    send(store, 3)
    held = store.claim(3)
    answer = postpone(store, held)
    assert answer.refused == {2}
    assert "queue.max_later is 2" in answer.why
    assert store._seqs_in_flight() == [held[2].seq]


def test_repeated_after_a_lost_answer(store: Store) -> None:
    """The second call finds nothing in flight, and puts nothing twice; after a restore neither."""
    wanted = send(store, 2)
    held = store.claim(2)
    due = time.time() + AHEAD_S
    postpone(store, held, due), postpone(store, held, due)
    assert store.restore().returned == 0
    let_come(store)
    move_due(store.client)
    assert ids(store.claim(9)) == wanted


def test_a_worker_that_is_taken_for_dead_postpones_nothing(broker: BrokerSettings, store: Store) -> None:
    """What a reaper has put back is another's: a call that comes late moves nothing."""
    send(store, 1)
    held = store.claim(1)
    store_of(broker).restore()
    postpone(store, held)
    assert traces(store) == []
    assert store.client.llen("realtime") == 1


def test_a_death_is_remembered(store: Store) -> None:
    """A task that has taken a worker down, and waits for its time then, has its death on its account."""
    send(store, 1)
    begin(store, store.claim(1))
    store.restore()
    postpone(store, store.claim(1))
    let_come(store)
    store.waits()
    (task,) = store.claim(1)
    assert decode(task.payload).deaths == 1


def test_they_are_counted_beside_what_waits(store: Store) -> None:
    """By lane, and how many of them are due within a time; what waits is what could run."""
    send(store, 2)
    first, second = store.claim(2)
    send(store, 1, queue="batch")
    store.postpone([(first.seq, time.time() + 10), (second.seq, time.time() + AHEAD_S)])
    depth = read_depth(store.client, ahead_s=60)
    lane = Lane("realtime", "digits")
    assert (depth.later, depth.due, depth.total_later) == ({lane: 2}, {lane: 1}, 2)
    assert depth.total_waiting == 1
    assert read_depth(store.client).due == {lane: 0}
    body = depth.to_dict()
    assert (body["later"], body["queues"]["realtime"]["later"]) == (2, {"digits": 2})


def test_a_list_that_is_none_stops_only_itself(store: Store) -> None:
    """Something else stands under the list's name: what is due there stays, and all others come."""
    wanted = send(store, 1)
    postpone(store, store.claim(1))
    send(store, 1, queue="batch")
    postpone(store, store.claim(1))
    let_come(store)
    store.client.set("batch", "a stranger's")
    assert move_due(store.client) == 1
    assert ids(store.claim(9)) == wanted
    assert store.client.zcard(keys.later("batch")) == 1
    store.client.delete("batch")
    let_come(store)
    assert move_due(store.client) == 1


@pytest.mark.parametrize("what", ["set", "index"])
def test_a_foreign_set_is_not_written_to(store: Store, what: str) -> None:
    """Something else stands under the set's name: the task stays in flight, and the answer says why."""
    send(store, 1)
    held = store.claim(1)
    name = keys.later("realtime") if what == "set" else keys.LATER
    store.client.set(name, "a stranger's")
    if what == "set":
        answer = postpone(store, held)
        assert answer.refused == {0}
        assert "WRONGTYPE" in answer.why
    else:
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            postpone(store, held)
    assert store._seqs_in_flight() == [held[0].seq]


def test_a_claim_brings_what_is_due(store: Store) -> None:
    """A worker that is never idle has no other look: what is due comes in the same call."""
    wanted = send(store, 2)
    postpone(store, store.claim(2))
    assert store.claim(2) == []
    let_come(store)
    assert ids(store.claim(2, state="busy")) == wanted
    assert traces(store) == []


def test_a_client_s_countdown(store: Store, client: Client) -> None:
    """It goes where it waits at once, in the order of submission; no worker has it meanwhile."""
    wanted = client.submit_many([[1]] * 3, countdown_s=AHEAD_S)
    assert store.claim(9) == []
    assert read_depth(store.client).later == {Lane("realtime", "digits"): 3}
    let_come(store)
    assert ids(store.claim(9)) == wanted
    task_id = client.submit([1], countdown_s=AHEAD_S, priority=9, idempotency_key="k")
    assert client.submit([1], countdown_s=AHEAD_S, priority=9, idempotency_key="k") == task_id
    assert client.cancel(task_id)
    assert client.submit([1], idempotency_key="k") != task_id  # a cancelled one holds its key no more
    with pytest.raises(InputError, match="countdown_s: must be less than expires_s"):
        client.submit([1], countdown_s=9.0, expires_s=9.0)


def test_a_client_hears_of_the_bound(broker: BrokerSettings, store: Store) -> None:
    """Of more than queue.max_later nothing is left behind."""
    settings = Settings(broker=broker, queue=QueueSettings(max_later=2))
    with Client(settings) as client:
        client.submit([1], countdown_s=AHEAD_S)
        with pytest.raises(QueueFull, match="max_later is 2"):
            client.submit_many([[1]] * 2, countdown_s=AHEAD_S)
    assert len(store.client.keys(keys.RESULT_PREFIX + "*")) == 1


def test_what_waits_and_what_does_not_are_not_joined(store: Store, broker: BrokerSettings) -> None:
    """Submitted in one turn of an event loop, each task waits for its own time."""

    async def submit() -> list[str]:
        async with AsyncClient(Settings(broker=broker)) as client:
            return list(await asyncio.gather(client.submit([1]), client.submit([2], countdown_s=AHEAD_S)))

    at_once, later = asyncio.run(submit())
    assert ids(store.claim(9)) == [at_once]
    let_come(store)
    assert ids(store.claim(9)) == [later]
