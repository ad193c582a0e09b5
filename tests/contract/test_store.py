# SPDX-License-Identifier: Apache-2.0
"""The queue's contract: claim to settle, on Redis and Valkey, over each kind of connection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from gpuinfer import Client
from gpuinfer.errors import TaskFailed, WorkerRunning
from gpuinfer.queue import keys, results
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import decode
from gpuinfer.queue.scripts import source
from gpuinfer.queue.store import SEQS_OF_A_LIFE, Claimed, Final, Store
from gpuinfer.settings import QUEUES, BrokerSettings, QueueSettings, Settings
from tests.conftest import need
from tests.services import RedisServer, free_port, make_certificate, redis_binary, valkey_binary

pytestmark = pytest.mark.integration


def _serve(kind: str, folder: Path) -> tuple[RedisServer, BrokerSettings]:
    server, way = kind.split("-")
    binary = {"redis": redis_binary(), "valkey": valkey_binary()}[server]
    need(binary is not None, f"{server}-server")
    port = free_port()
    if way == "socket":
        made = RedisServer(binary)
        return made, BrokerSettings(url=made.url)
    if way == "tcp":
        made = RedisServer(binary, port=port, requirepass="a:b/c@d")
        return made, BrokerSettings(url=f"redis://127.0.0.1:{port}/0", password=SecretStr("a:b/c@d"))
    certificate, key = make_certificate(folder)
    made = RedisServer(
        binary,
        tls_port=port,
        tls_cert_file=str(certificate),
        tls_key_file=str(key),
        tls_ca_cert_file=str(certificate),
        tls_auth_clients="no",
    )
    return made, BrokerSettings(url=f"rediss://127.0.0.1:{port}/0", tls_ca=certificate)


@pytest.fixture(params=["redis-socket", "redis-tcp", "redis-tls", "valkey-socket", "valkey-tls"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerSettings]:
    """The settings of a server of each kind."""
    server, settings = _serve(request.param, tmp_path)
    try:
        yield settings
    finally:
        server.close()


@pytest.fixture
def client(broker: BrokerSettings) -> Iterator[Client]:
    with Client(Settings(broker=broker)) as opened:
        yield opened


@pytest.fixture
def store(broker: BrokerSettings) -> Store:
    return Store(connect(broker, retries=0), "gpu0@here", QUEUES, QueueSettings(ageing_s=0))


def ids(claimed: list[Claimed]) -> list[str]:
    return [decode(task.payload).id for task in claimed]


def done(task: Claimed, value: Any = 1) -> Final:
    task_id = decode(task.payload).id
    return Final(task.seq, task_id, results.success(task_id, value, worker="w"))


def begin(store: Store, tasks: list[Claimed]) -> set[int]:
    return store.begin(
        [(t.seq, decode(t.payload).id, results.started(decode(t.payload).id, "w", 1)) for t in tasks]
    )


def test_from_submission_to_result(store: Store, client: Client) -> None:
    """A task goes from queued to running to completed, and nothing of it is left but its result."""
    task_id = client.submit([1.0])
    assert client.status(task_id).state == "queued"
    (task,) = store.claim(10)
    assert not begin(store, [task])
    assert client.status(task_id).state == "running"
    assert store.settle([done(task, {"a": 1})], idle=True) == 1
    assert client.result(task_id, timeout_s=5) == {"a": 1}
    assert not store.client.exists(store.inflight)
    assert 0 < store.client.ttl(keys.result(task_id)) <= 3600


def test_order(store: Store, client: Client) -> None:
    """Queue before priority, 9 first, equals first in first out, across claims."""
    wanted = []
    for queue in QUEUES:
        for priority in (9, 5, 0):
            wanted += [client.submit([1], queue=queue, priority=priority) for _ in range(2)]
    shuffled = sorted(range(len(wanted)), key=lambda i: (i * 7) % 5)
    assert len(shuffled) == 18
    assert ids(store.claim(5)) + ids(store.claim(5)) + ids(store.claim(100)) == wanted


def test_only_better(store: Store, client: Client) -> None:
    """A claim for what would overtake takes from better lists alone."""
    low = client.submit([1], queue="batch")
    high = client.submit([1], queue="realtime", priority=3)
    assert ids(store.claim(10, better_than=20)) == [high]
    assert store.claim(10, better_than=20) == []
    assert ids(store.claim(10)) == [low]


def test_ageing(broker: BrokerSettings, client: Client) -> None:
    """A list that was passed over for long enough goes first, once; then it waits again."""
    store = Store(connect(broker), "gpu0@here", QUEUES, QueueSettings(ageing_s=0.05))
    low = [client.submit([1], queue="batch") for _ in range(2)]
    high = [client.submit([1]) for _ in range(6)]
    assert ids(store.claim(1)) == high[:1]
    store.client.hset(keys.WAITING, "batch", 1)  # it has waited since 1970
    aged = store.claim(1)
    assert ids(aged) == low[:1]
    assert aged[0].aged
    assert aged[0].rank == 29
    assert ids(store.claim(1)) == high[1:2]


def test_what_was_emptied_does_not_age(broker: BrokerSettings, client: Client) -> None:
    """New tasks of lists that were drained a while ago have waited for nothing: the urgent go first."""
    store = Store(connect(broker), "gpu0@here", QUEUES, QueueSettings(ageing_s=0.05))
    for _ in range(2):
        client.submit([1], queue="batch")
        client.submit([1])
        assert len(store.claim(10)) == 2
        assert not store.client.exists(keys.WAITING)
    low = client.submit([1], queue="batch")
    client.submit([1])
    store.claim(1)
    store.claim(10, better_than=30)
    time.sleep(0.06)
    low, high = client.submit([1], queue="batch"), client.submit([1], priority=9)
    assert ids(store.claim(1)) == [high]
    assert ids(store.claim(1)) == [low]


def test_a_claim_takes_so_many_bytes(store: Store, client: Client) -> None:
    """Large payloads are left for others once a claim has its bytes; one task is taken whatever its size."""
    for _ in range(10):
        client.submit("x" * 100_000)
    assert len(store.claim(10, max_bytes=1)) == 1
    assert len(store.claim(10, max_bytes=250_000)) == 3
    assert len(store.claim(10)) == 6


def test_release_keeps_the_order(store: Store, client: Client) -> None:
    """What is handed back stands at the head again, in its order, without a mark."""
    wanted = [client.submit([1]) for _ in range(5)]
    claimed = store.claim(4)
    assert store.release([task.seq for task in reversed(claimed)]) == 4
    assert store.release([task.seq for task in claimed]) == 0
    again = store.claim(5)
    assert ids(again) == wanted
    assert {decode(task.payload).deliveries for task in again} == {0}


def test_what_ran_in_part_comes_again_as_a_repeat(store: Store, client: Client) -> None:
    """A task that is handed back after a part of it has run is flagged at its next delivery."""
    client.submit([1]), client.submit([1])
    first, second = store.claim(2)
    for deliveries in (1, 2):
        assert store.release([first.seq, second.seq], ran={second.seq}) == 2
        first, second = store.claim(2)
        assert [decode(task.payload).deliveries for task in (first, second)] == [0, deliveries]
        assert decode(second.payload).deaths == 0


def test_restore_counts_deaths_of_what_ran(store: Store, client: Client) -> None:
    """After a death all is back in its order; what ran has a death on its record, the rest has not."""
    wanted = [client.submit([1]) for _ in range(3)]
    claimed = store.claim(3)
    begin(store, claimed[:1])
    assert store.restore().returned == 3
    again = [decode(task.payload) for task in store.claim(3)]
    assert [envelope.id for envelope in again] == wanted
    assert [(envelope.deliveries, envelope.deaths) for envelope in again] == [(1, 1), (1, 0), (1, 0)]


def test_two_deaths_end_in_the_dead_letters(store: Store, client: Client) -> None:
    """The second death of a task is its end: a dead letter and a failure, however often restore is called."""
    task_id = client.submit([1])
    for _ in range(2):
        begin(store, store.claim(1))
        found = store.restore()
    assert found.dead == (task_id,)
    assert client.status(task_id).state == "failed"
    assert store.client.hlen(keys.DEAD) == 1
    assert store.restore().returned == 0
    assert store.claim(1) == []


def test_restore_cut_off_before_the_burial(store: Store, client: Client) -> None:
    """Killed between counting and burying, a restore does the rest when it is called again."""
    task_id = client.submit([1])
    begin(store, store.claim(1))
    store.restore()
    begin(store, store.claim(1))
    store._restore(  # and then it is killed
        keys=[store.inflight], args=[keys.BELL_PREFIX, keys.SEP, 2, keys.RESULT_PREFIX, results.PENDING_META]
    )
    assert client.status(task_id).state == "running"
    assert store.restore().dead == (task_id,)
    assert not store.client.exists(store.inflight)


def test_a_final_state_is_written_once(store: Store, client: Client) -> None:
    """A late duplicate neither overwrites the first end nor runs again."""
    task_id = client.submit([1])
    (task,) = store.claim(1)
    store.settle([done(task, "first")])
    assert store.settle([done(task, "second")]) == 0
    late = Final(None, task_id, results.failure(task_id, TaskFailed("late"), worker="w"))
    assert store.settle([late]) == 0
    assert client.result(task_id, timeout_s=1) == "first"
    assert begin(store, [task]) == {0}


def test_an_end_that_is_not_kept_is_told(store: Store, client: Client) -> None:
    """Who waits for a task that keeps no result hears of its end; then nothing is left of it."""
    kept, unkept = client.submit([1]), client.submit([1], ignore_result=True)
    tasks = store.claim(2)
    heard = store.client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    heard.subscribe(keys.result(unkept))
    heard.get_message(timeout=1)
    finals = [done(task) for task in tasks]
    assert store.settle([finals[0], replace(finals[1], keep=False)]) == 1
    assert (heard.get_message(timeout=1) or {})["data"] == finals[1].meta
    heard.close()
    assert client.status(kept).final
    assert not store.client.exists(keys.result(unkept))


def test_a_life_is_never_counted_twice(store: Store, client: Client) -> None:
    """A Redis that has lost its last writes counts on from where the worker was."""
    client.submit([1])
    (task,) = store.claim(1)
    store.client.delete(keys.life(store.worker))
    store.doubt()
    store.reconcile([task.seq])
    client.submit([1])
    (other,) = store.claim(1)
    assert other.seq > task.seq
    assert other.seq // SEQS_OF_A_LIFE == task.seq // SEQS_OF_A_LIFE + 1


def test_the_scripts_know_a_waiting_task() -> None:
    """They compare a state with what producers write, by its beginning; another word would only be slower."""
    for name in ("begin", "settle"):
        assert f"'{results.PENDING_META[:32].decode()}'" in source(name)


def test_a_claim_of_many_is_whole(store: Store, client: Client) -> None:
    """A claim of more than one command records is recorded as a whole, and settled as a whole."""
    wanted = client.submit_many([[1]] * 700)
    claimed = store.claim(600)
    assert ids(claimed) == wanted[:600]
    held = store.client.hgetall(store.inflight)
    assert {int(field) for field in held if field.isdigit()} == {task.seq for task in claimed}
    assert sum(value == b"realtime" for value in held.values()) == 600
    assert store.settle([done(task) for task in claimed]) == 600
    assert not store.client.exists(store.inflight)


def test_cancelled_is_not_begun(store: Store, client: Client) -> None:
    """A cancelled task is reported by begin; one that runs cannot be cancelled."""
    client.submit([1])
    second = client.submit([1])
    claimed = store.claim(2)
    assert client.cancel(second)
    assert begin(store, claimed) == {1}
    assert not client.cancel(ids(claimed)[0])


def test_a_lost_answer_loses_nothing(store: Store, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that ran while its answer was lost is found again, and not written over by the next."""
    wanted = [client.submit([1]) for _ in range(4)]
    real = store._claim

    def cut(**call: Any) -> None:
        real(**call)
        raise redis.ConnectionError("cut off")

    monkeypatch.setattr(store, "_claim", cut)
    with pytest.raises(redis.ConnectionError):
        store.claim(2)
    monkeypatch.setattr(store, "_claim", real)
    held = store.claim(1)
    assert ids(held) == wanted[2:3]
    assert store.reconcile({task.seq for task in held}) == 2
    assert ids(store.claim(9)) == [*wanted[:2], wanted[3]]


def test_a_claim_held_up_on_its_way_is_refused(store: Store, client: Client) -> None:
    """A claim that arrives after the worker has given it up takes nothing: nobody would know of it."""
    client.submit([1])
    first = store.claim(1)
    late = {
        "keys": [store.inflight, keys.WAITING, keys.bell("realtime"), keys.life(store.worker), *store.lists],
        "args": [1, 0, store._seq, store._life],
    }
    client.submit([1])
    store.doubt()
    assert store.reconcile({task.seq for task in first}) == 0
    with pytest.raises(redis.ResponseError, match="STALE"):
        store._claim(**late)
    assert len(store.claim(1)) == 1


def test_two_lives_do_not_meet(broker: BrokerSettings, store: Store, client: Client) -> None:
    """What an earlier process of the same name settles late is its own; and it claims no more."""
    wanted = [client.submit([1]) for _ in range(4)]
    old = store.claim(2)
    next_life = Store(connect(broker), store.worker, QUEUES, QueueSettings())
    assert next_life.restore().returned == 2
    new = next_life.claim(2)
    assert ids(new) == wanted[:2]
    store.settle([done(old[0])])
    store.release([task.seq for task in old])
    assert next_life.restore().returned == 2
    with pytest.raises(WorkerRunning, match="taken over"):
        store.claim(1)
    assert ids(next_life.claim(9)) == wanted


def test_restored_tasks_wait_again(store: Store, client: Client) -> None:
    """What had begun when its worker died is queued again, says so, and can be cancelled."""
    task_id = client.submit([1])
    begin(store, store.claim(1))
    assert client.status(task_id).state == "running"
    store.restore()
    assert client.status(task_id).state == "queued"
    assert client.cancel(task_id)


def test_no_death_on_the_account_of_what_does_not_run(store: Store, client: Client) -> None:
    """A task whose batch has ended, and which waits for another, has no share in a later death."""
    client.submit([1])
    claimed = store.claim(1)
    begin(store, claimed)
    store.settle([], idle=True)
    store.restore()
    assert [decode(task.payload).deaths for task in store.claim(1)] == [0]


def test_a_claim_that_begins(store: Store, client: Client) -> None:
    """A task that comes alone is on record as running with its claim; one of several is not."""
    wanted = [client.submit([1], queue=queue) for queue in ("realtime", "batch", "batch")]
    (first,) = store.claim(1, begin=True)
    assert first.noted_id == wanted[0]
    assert store.restore().returned == 1
    again = store.claim(3, begin=True)
    assert [task.noted_id for task in again] == [None] * 3
    assert [decode(task.payload).deaths for task in again] == [1, 0, 0]
    store.restore()
    assert [decode(task.payload).deaths for task in store.claim(3)] == [1, 0, 0]


def test_a_claim_that_begins_nothing(store: Store, client: Client) -> None:
    """What has ended, what is too long to search through, and what names no id is left to begin."""
    for inputs in ([1], [0.1] * 10_000):
        task_id = client.submit(inputs)
        if inputs == [1]:
            assert client.cancel(task_id)
        (task,) = store.claim(1, begin=True)
        assert task.noted_id is None
        assert begin(store, [task]) == ({0} if inputs == [1] else set())
        store.settle([Final(task.seq, "", b"")], idle=True)
    store.client.lpush("realtime", b'{"body": "\\"id\\": \\"x\\""}')
    assert store.claim(1, begin=True)[0].noted_id is None
    assert not store.client.hexists(store.inflight, "running")


def test_idempotency(store: Store, client: Client) -> None:
    """The same key gives the same task, while it waits and when it has ended; another key another one."""
    first = client.submit([1], idempotency_key="k")
    assert client.submit([1], idempotency_key="k") == first
    (task,) = store.claim(9)
    store.settle([done(task)])
    assert client.submit([1], idempotency_key="k") == first
    assert client.submit([1], idempotency_key="other") != first
    store.client.delete(keys.result(first))
    assert client.submit([1], idempotency_key="k") != first


def test_claims_are_counted_for_the_watcher(store: Store, client: Client) -> None:
    """How many tasks were ever claimed of each list: with what waits, that is what ever arrived.

    What is put back waits again, and counts once.
    """
    for priority in (0, 0, 9):
        client.submit([1], priority=priority)
    store.release([task.seq for task in store.claim(2)])
    store.claim(2)
    store.restore()
    store.claim(2)
    store.claim(5)
    counts = store.client.hgetall(keys.CLAIMED)
    assert counts == {b"realtime": b"2", keys.list_key("realtime", 9).encode(): b"1"}
