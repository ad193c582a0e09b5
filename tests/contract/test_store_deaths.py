# SPDX-License-Identifier: Apache-2.0
"""The queue's contract when a worker dies: what comes back, in which order, and on whose account."""

from __future__ import annotations

import json

import pytest

from gpuinfer import Client
from gpuinfer.errors import WorkerRunning
from gpuinfer.queue import keys, results
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings
from tests.contract.conftest import begin, done, ids, store_of

pytestmark = pytest.mark.integration


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
    (seq,) = store._seqs_in_flight()
    args = (store._epoch.number, 2, 1000, 1, seq)
    store._restore(keys=[store.inflight, keys.epoch(store.worker)], args=args)  # and then it is killed
    assert client.status(task_id).state == "running"
    assert store.restore().dead == (task_id,)
    assert not store.client.exists(store.inflight)


def test_two_epochs_do_not_meet(broker: BrokerSettings, store: Store, client: Client) -> None:
    """What an earlier process of the same name settles late is its own; and it claims no more."""
    wanted = [client.submit([1]) for _ in range(4)]
    old = store.claim(2)
    after = store_of(broker)
    assert after.restore().returned == 2
    new = after.claim(2)
    assert ids(new) == wanted[:2]
    store.settle([done(old[0])])
    store.release([task.seq for task in old])
    assert after.restore().returned == 2
    with pytest.raises(WorkerRunning, match="taken over"):
        store.claim(1)
    assert ids(after.claim(9)) == wanted


def test_restored_tasks_wait_again(store: Store, client: Client) -> None:
    """What had begun when its worker died is queued again, says so, and can be cancelled."""
    task_id = client.submit([1])
    begin(store, store.claim(1))
    assert client.status(task_id).state == "running"
    store.restore()
    assert client.status(task_id).state == "queued"
    assert client.cancel(task_id)


@pytest.mark.parametrize(
    ("headers", "correlation_id", "task_id"),
    [({}, "in the body", "in the body"), ({"id": "a/\u00e4"}, "", "a/\u00e4")],
    ids=["protocol 1", "written by PHP"],
)
def test_restore_finds_the_id_of_any_producer(
    store: Store, client: Client, headers: dict[str, str], correlation_id: str, task_id: str
) -> None:
    """The state of what had begun is found also where the id is the correlation id, or escaped."""
    text = json.dumps({"headers": headers, "properties": {"correlation_id": correlation_id}})
    store.client.lpush("realtime", text.replace("/", "\\/"))
    (task,) = store.claim(1, search=True)
    store.begin([(task.seq, task_id, results.started(task_id, "w", 1))])
    assert client.status(task_id).state == "running"
    store.restore()
    assert client.status(task_id).state == "queued"


def test_no_death_on_the_account_of_what_does_not_run(store: Store, client: Client) -> None:
    """A task whose batch has ended, and which waits for another, has no share in a later death."""
    client.submit([1])
    claimed = store.claim(1)
    begin(store, claimed)
    store.settle([], idle=True)
    store.restore()
    assert [decode(task.payload).deaths for task in store.claim(1)] == [0]


def test_a_death_while_a_task_is_read(store: Store, client: Client) -> None:
    """It counts against what runs and what is read, as long as that is on record; and for nobody else."""
    for _ in range(4):
        client.submit([1])
    claimed = store.claim(4)
    begin(store, claimed[:1])
    store.note([claimed[0].seq, claimed[2].seq])
    store.restore()
    again = store.claim(4)
    assert [decode(task.payload).deaths for task in again] == [1, 0, 1, 0]
    store.note([again[1].seq])
    store.note([])
    store.restore()
    assert [decode(task.payload).deaths for task in store.claim(4)] == [1, 0, 1, 0]
