# SPDX-License-Identifier: Apache-2.0
"""A worker's epochs: no sequence id comes twice, and who was taken for dead goes on with what is its own."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.errors import FormatMismatch, TakenBack, WorkerRunning
from gpuinfer.queue import keys
from gpuinfer.queue.epoch import SEQS_OF_AN_EPOCH
from gpuinfer.queue.orphans import holders
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings
from tests.contract.conftest import done, ids, on, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]


def reaper_of(store: Store) -> Store:
    """Return a store that stands for a watcher's reaper."""
    by = "reaper of there"
    return Store(store.client, store.worker, store.queues, store._settings, models=store.models, by=by)


def test_an_epoch_ends_in_mid_flow(store: Store, client: Client) -> None:
    """After 2^24 sequence ids another one begins; none comes twice, and what is held stays valid."""
    wanted = client.submit_many([[1]] * 40)
    held = store.claim(2)
    store._seq = (store._epoch.number + 1) * SEQS_OF_AN_EPOCH - 9
    epoch = store._epoch.number
    while claimed := store.claim(4):
        held += claimed
    assert ids(held) == wanted
    assert len({task.seq for task in held}) == 40
    assert store._epoch.number == epoch + 1
    assert store.settle([done(task) for task in held]) == {}
    assert not store.client.exists(store.inflight)
    assert {client.status(task_id).state for task_id in wanted} == {"completed"}


def test_an_epoch_that_is_too_short_is_not_ordered(store: Store) -> None:
    """A claim that waits cannot begin one; the next call does."""
    store.claim(1)
    store._seq = (store._epoch.number + 1) * SEQS_OF_AN_EPOCH - 9
    assert store.order(store.wants(9)) is None
    assert store.order(store.wants(8)) is not None
    store.claim(9)
    assert store.order(store.wants(9)) is not None


def test_who_was_taken_for_dead_goes_on(store: Store, client: Client) -> None:
    """After a reaper it holds nothing, begins an epoch, and works; after another process it does not."""
    wanted = client.submit_many([[1]] * 4)
    old = store.claim(2)
    assert reaper_of(store).restore().returned == 2
    with pytest.raises(TakenBack, match="reaper of there"):
        store.claim(1)
    store.rejoin()
    new = store.claim(4)
    assert ids(new) == wanted
    assert not {task.seq for task in old} & {task.seq for task in new}
    store.release([task.seq for task in old])
    store.settle([done(task) for task in new])
    assert {client.status(task_id).state for task_id in wanted} == {"completed"}
    store_of_same_name(store).claim(1)
    with pytest.raises(WorkerRunning, match="taken over"):
        store.claim(1)


def test_a_redis_that_came_back_empty(store: Store, client: Client) -> None:
    """What a worker holds is found there: it says again that it lives, before the next claim."""
    store.claim(1)
    store.client.flushall()
    store.mark_uncertain()
    store.reconcile(())
    store.client.set(keys.DEFAULT_MODEL, "digits")
    client.submit([1])
    assert len(store.claim(1)) == 1
    assert [(one.worker, one.tasks) for one in holders(store.client)] == [(store.worker, 1)]


def test_names_that_do_not_come_back(broker: BrokerSettings, store: Store, client: Client) -> None:
    """What is left of workers unseen for a day without tasks, of their groups, of who was idle: nothing.

    The watcher forgets their epochs; without one, nothing but these stays.
    """
    gone, holds = store_of(broker, "gpu0@gone", ("old",)), store_of(broker, "gpu0@holds", ("old",))
    client.submit([1], model="old")
    assert len(holds.claim(1)) == 1
    assert gone.claim(1, state="idle") == []
    gone.register(b'{"models": ["old"]}')
    raw: Any = store.client
    raw.lpush(keys.wake(gone.worker), 1)
    now = raw.time()[0]
    for name in (gone.worker, holds.worker):
        raw.zadd(keys.WORKERS, {name: now - keys.WORKER_VOID_S - 1})
    raw.zadd(keys.IDLE_PREFIX + store.group, {"x": now - 99, "y": 99 - now, "here": now, "woken": -now})
    raw.zadd(keys.CATALOGUE, {"old": now - keys.MODEL_VOID_S - 1})
    store.register()
    assert raw.exists(keys.heartbeat(gone.worker), keys.epoch(gone.worker)) == 2
    assert forget(store) == 1
    store.register()
    assert raw.zrange(keys.WORKERS, 0, -1) == [holds.worker.encode(), store.worker.encode()]
    assert not raw.exists(keys.heartbeat(gone.worker), keys.epoch(gone.worker), keys.wake(gone.worker))
    assert raw.exists(keys.epoch(holds.worker), holds.inflight) == 2
    assert set(raw.zrange(keys.IDLE_PREFIX + store.group, 0, -1)) == {b"here", b"woken"}
    assert not raw.exists(keys.IDLE_PREFIX + gone.group, f"{keys.GROUPS_PREFIX}realtime.old")
    assert raw.zrange(keys.CATALOGUE, 0, -1) == [b"digits"]


def test_names_that_have_left(broker: BrokerSettings, store: Store, client: Client) -> None:
    """Nothing is left of a worker that stopped in order a day ago, unless it is back or holds tasks."""
    raw: Any = store.client
    left, back, holds = (store_of(broker, f"{name}@x") for name in ("left", "back", "holds"))
    assert left.claim(1) == back.claim(1) == []
    client.submit([1])
    assert len(holds.claim(1)) == 1
    for one in (left, back, holds):
        one.leave()
    back.register()
    assert raw.zcard(keys.LEFT) == 2
    assert forget(store) == 0
    for name in ("left@x", "back@x", "holds@x"):
        raw.zadd(keys.LEFT, {name: 1})
    assert forget(store) == 1
    assert [raw.exists(keys.epoch(one.worker)) for one in (left, back, holds)] == [0, 1, 1]
    assert not raw.exists(keys.LEFT)


def forget(store: Store) -> int:
    """Forget the epochs of names that do not come back, as a watcher does; return how many."""
    return int(bind(store.client, "forget")())


def store_of_same_name(store: Store) -> Store:
    return Store(store.client, store.worker, store.queues, store._settings, models=store.models)


def test_a_reaper_that_is_cut_off(store: Store, client: Client) -> None:
    """It has begun an epoch and put nothing back: the worker, which has dropped what it held, does so."""
    wanted = client.submit_many([[1]] * 4)
    store.claim(3)
    reaper_of(store)._begin_epoch()
    with pytest.raises(TakenBack):
        store.claim(1)
    store.rejoin()
    assert store.reconcile(()) == 3
    assert ids(store.claim(4)) == wanted


@pytest.mark.parametrize("found", ["1", "3", "x"])
def test_another_format(store: Store, client: Client, broker: BrokerSettings, found: str) -> None:
    """Who meets another layout in Redis says which, and touches nothing."""
    store.claim(1)
    store.client.set(keys.FORMAT_KEY, found)
    before = sorted(store.client.keys())
    with pytest.raises(FormatMismatch, match=f"format {found}") as refused:
        store_of(broker).claim(1)
    assert refused.value.exit_code == 78
    with pytest.raises(FormatMismatch, match=f"format {found}"):
        client.submit([1])
    assert sorted(store.client.keys()) == before


def test_the_first_one_writes_the_format(store: Store) -> None:
    """Redis knows its layout once a worker has begun."""
    store.claim(1)
    assert store.client.get(keys.FORMAT_KEY) == str(keys.FORMAT).encode()
