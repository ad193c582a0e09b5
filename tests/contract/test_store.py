# SPDX-License-Identifier: Apache-2.0
"""The queue's contract: claim to settle, on Redis and Valkey, over each kind of connection."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis

from gpuinfer import Client
from gpuinfer.errors import TaskFailed, WorkerRunning
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Final
from gpuinfer.queue.depth import Lane
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.epoch import SEQS_OF_AN_EPOCH
from gpuinfer.queue.message import decode
from gpuinfer.queue.scripts import source
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, BrokerSettings, QueueSettings
from tests.contract.conftest import begin, done, ids, store_of

pytestmark = pytest.mark.integration


def test_from_submission_to_result(store: Store, client: Client) -> None:
    """A task goes from queued to running to completed, and nothing of it is left but its result."""
    task_id = client.submit([1.0])
    assert client.status(task_id).state == "queued"
    (task,) = store.claim(10)
    assert not begin(store, [task])
    assert client.status(task_id).state == "running"
    assert store.settle([done(task, {"a": 1})], idle=True) == {}
    assert client.result(task_id, timeout_s=60) == {"a": 1}
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
    assert ids(store.claim(store.wants(10, better_than=20))) == [high]
    assert store.claim(store.wants(10, better_than=20)) == []
    assert ids(store.claim(10)) == [low]


def test_ageing(broker: BrokerSettings, client: Client) -> None:
    """A list that was passed over for long enough goes first, once; then it waits again."""
    store = store_of(broker, ageing_s=0.05)
    low = [client.submit([1], queue="batch") for _ in range(2)]
    high = [client.submit([1]) for _ in range(6)]
    assert ids(store.claim(1)) == high[:1]
    store.client.hset(keys.AGEING_PREFIX + store.group, "batch", "1 0")  # it has waited since 1970
    store.client.delete(keys.AGED_PREFIX + store.group)  # the next look is due
    aged = store.claim(1)
    assert ids(aged) == low[:1]
    assert aged[0].aged
    assert aged[0].rank == 29
    assert ids(store.claim(1)) == high[1:2]


def test_what_was_emptied_does_not_age(broker: BrokerSettings, client: Client) -> None:
    """New tasks of lists that were drained a while ago have waited for nothing: the urgent go first."""
    store = store_of(broker, ageing_s=0.05)
    for _ in range(2):
        client.submit([1], queue="batch")
        client.submit([1])
        assert len(store.claim(10)) == 2
    low = client.submit([1], queue="batch")
    client.submit([1])
    store.claim(1)
    store.claim(store.wants(10, better_than=30))
    time.sleep(0.06)
    low, high = client.submit([1], queue="batch"), client.submit([1], priority=9)
    assert ids(store.claim(1)) == [high]
    assert ids(store.claim(1)) == [low]


def test_a_claim_takes_so_many_bytes(store: Store, client: Client) -> None:
    """Large payloads are left for others once a claim has its bytes; one task is taken whatever its size."""
    for _ in range(10):
        client.submit("x" * 50_000)
    assert len(store.claim(10, max_bytes=1)) == 1
    assert len(store.claim(10, max_bytes=125_000)) == 3
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


def test_a_final_state_is_written_once(store: Store, client: Client) -> None:
    """A late duplicate neither overwrites the first end nor runs again."""
    task_id = client.submit([1])
    (task,) = store.claim(1)
    store.settle([done(task, "first")])
    store.settle([done(task, "second")])
    store.settle([Final(None, task_id, results.failure(task_id, TaskFailed("late"), worker="w"))])
    assert client.result(task_id, timeout_s=1) == "first"
    assert begin(store, [task]) == {0}


def test_an_end_that_is_not_kept_is_told(store: Store, client: Client) -> None:
    """Who waits for a task that keeps no result hears of its end; then nothing is left of it."""
    kept, unkept = client.submit([1]), client.submit([1], ignore_result=True)
    tasks = store.claim(2)
    heard = store.client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    heard.subscribe(keys.result(unkept))
    heard.get_message(timeout=60)
    finals = [done(task) for task in tasks]
    store.settle([finals[0], finals[1]._replace(keep=False)])
    assert (heard.get_message(timeout=60) or {})["data"] == finals[1].meta
    heard.close()
    assert client.status(kept).final
    assert not store.client.exists(keys.result(unkept))


def test_an_epoch_never_comes_twice(store: Store, client: Client) -> None:
    """A Redis that has lost its last writes counts on from where the worker was."""
    client.submit([1])
    (task,) = store.claim(1)
    store.client.delete(keys.epoch(store.worker))
    store.mark_uncertain()
    store.reconcile([task.seq])
    client.submit([1])
    (other,) = store.claim(1)
    assert other.seq > task.seq
    assert other.seq // SEQS_OF_AN_EPOCH == task.seq // SEQS_OF_AN_EPOCH + 1


def test_the_scripts_know_a_waiting_task() -> None:
    """They compare a state with what producers write, by its beginning; another word would only be slower."""
    assert f"text == '{results.PENDING_META[:32].decode()}'" in source("submit")


def test_a_claim_of_many_is_whole(store: Store, client: Client) -> None:
    """A claim of more than one command records is recorded as a whole, and settled as a whole."""
    wanted = client.submit_many([[1]] * 700)
    claimed = store.claim(600)
    assert ids(claimed) == wanted[:600]
    held = store.client.hgetall(store.inflight)
    assert {int(field) for field in held if field.isdigit()} == {task.seq for task in claimed}
    assert sum(value == b"realtime" for value in held.values()) == 600
    assert store.settle([done(task) for task in claimed]) == {}
    assert {status.state for status in map(client.status, wanted[:600])} == {"completed"}
    assert not store.client.exists(store.inflight)


def test_cancelled_is_not_begun(store: Store, client: Client) -> None:
    """A cancelled task is reported by begin; one that runs by a look, which leaves the record as it is."""
    client.submit([1])
    second = client.submit([1])
    claimed = store.claim(2)
    assert client.cancel(second)
    assert begin(store, claimed) == {1}
    record = store.client.hget(store.inflight, "running")
    assert store.ended(ids(claimed)) == {1}
    assert client.cancel(ids(claimed)[0])
    assert not client.cancel(ids(claimed)[0])
    assert store.ended(ids(claimed)) == {0, 1}
    assert store.client.hget(store.inflight, "running") == record


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
    late = store.order(store.wants(1))
    assert late is not None
    client.submit([1])
    store.mark_uncertain()
    assert store.reconcile({task.seq for task in first}) == 0
    assert not store.current(late)
    with pytest.raises(redis.ResponseError, match="STALE"):
        store.client.execute_command(*late.command)  # type: ignore[no-untyped-call]
    assert len(store.claim(1)) == 1


def test_an_epoch_held_up_on_its_way_does_not_begin(
    store: Store, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker has given it up and counted again; it goes on."""
    client.submit([1])
    first = store.claim(1)
    real = store._epoch._begin
    late: dict[str, Any] = {}

    def cut(**call: Any) -> None:
        late.update(call)
        raise redis.TimeoutError("cut off")

    store.mark_uncertain()
    with monkeypatch.context() as patch:
        patch.setattr(store._epoch, "_begin", cut)
        with pytest.raises(redis.TimeoutError):
            store.reconcile({task.seq for task in first})
    assert store.reconcile({task.seq for task in first}) == 0
    with pytest.raises(redis.ResponseError, match="STALE"):
        real(**late)
    client.submit([1])
    assert len(store.claim(1)) == 1


def test_a_worker_in_doubt_does_not_take_its_name_back(store: Store) -> None:
    """Another process has taken over: this one learns that, be it by its claim or by its doubt."""
    store.claim(1)
    twin = Store(store.client, store.worker, store.queues, store._settings, models=store.models)
    twin.claim(1)
    store.mark_uncertain()
    with pytest.raises(WorkerRunning, match="taken over"):
        store.reconcile(set())
    assert twin.claim(1) == []


def test_a_restore_held_up_on_its_way_is_refused(
    store: Store, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives when the next process works already: what that holds stays with it."""
    late: dict[str, Any] = {}

    def cut(**call: Any) -> None:
        late.update(call)
        raise redis.TimeoutError("cut off")

    real = store._restore
    with monkeypatch.context() as patch:
        patch.setattr(store, "_restore", cut)
        with pytest.raises(redis.TimeoutError):
            store.restore()
    client.submit([1])
    store.restore()
    held = store.claim(1)
    with pytest.raises(redis.ResponseError, match="STALE"):
        real(**late)
    assert store.client.hexists(store.inflight, str(held[0].seq))


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
    assert store.claim(1, begin=True, search=True)[0].noted_id is None
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
    assert client.submit([1], idempotency_key="k") == first, "also when its result has expired"


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
    urgent = keys.list_key("realtime", 9).encode()
    assert counts == {b"realtime digits": b"2", urgent + b" digits": b"1"}


def test_what_was_claimed_of_a_default_model_stays_its_own(store: Store, client: Client) -> None:
    """Should another one be the default: rates and ages are told by model, and a count never falls."""
    client.submit_many([[1]] * 3)
    assert len(store.claim(3)) == 3
    store.client.zadd(keys.CATALOGUE, {"ocr": 1e10})
    store.client.set(keys.DEFAULT_MODEL, "ocr")
    assert read_depth(store.client).claimed == {Lane("realtime", "digits"): 3}
    client.submit([1], model="ocr")
    other = Store(store.client, "gpu1@here", QUEUES, QueueSettings(), models=("ocr",))
    assert len(other.claim(3)) == 1
    assert read_depth(store.client).claimed == {Lane("realtime", "digits"): 3, Lane("realtime", "ocr"): 1}
