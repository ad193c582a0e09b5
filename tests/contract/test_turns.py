# SPDX-License-Identifier: Apache-2.0
"""Models, and callers of a model, take turns: nobody's backlog holds up anybody else."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from gpuinfer.queue import keys
from gpuinfer.queue.callers import tidy
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.quota import weighing
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings
from tests.contract.conftest import commands, ids, message, on, send, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]


@pytest.fixture
def both(broker: BrokerSettings) -> Store:
    """A worker that serves two models beside the default one."""
    return store_of(broker, models=("digits", "ant", "zebra"))


def caller_of(task: Claimed) -> str:
    return keys.place_of(task.list_key).caller


@pytest.mark.parametrize(("full", "new"), [("ant", "zebra"), ("zebra", "ant"), ("digits", "ant")])
def test_a_backlog_does_not_hold_up_another_model(both: Store, full: str, new: str) -> None:
    """Each claim is one model's batch; one whose turn it is waits for one batch at most."""
    send(both, 400, model=full)
    both.claim(8)
    both.claim(8)
    send(both, 40, model=new)
    served = Counter(both.claim(8)[0].model for _ in range(10))
    assert served == {full: 5, new: 5}


@pytest.mark.parametrize(("full", "new"), [("ant", "zebra"), ("zebra", "ant")])
def test_who_comes_one_by_one_waits_for_one_batch(both: Store, full: str, new: str) -> None:
    """A model whose list is emptied each time is neither passed over nor does it pass the backlog over."""
    send(both, 400, model=full)
    both.claim(8)
    served: Counter[str] = Counter()
    for _ in range(20):
        (task,) = send(both, 1, model=new)
        two = [both.claim(8), both.claim(8)]
        assert task in ids(two[0]) + ids(two[1])
        served.update(tasks[0].model for tasks in two)
    assert served == {full: 20, new: 20}


@pytest.mark.parametrize(("full", "new"), [("ant", "zebra"), ("zebra", "ant")])
def test_a_steady_trickle_does_not_hold_up_a_backlog(both: Store, full: str, new: str) -> None:
    """One task of another model before each claim: the backlog gets every other one."""
    send(both, 400, model=full)
    served: Counter[str] = Counter()
    for _ in range(40):
        send(both, 1, model=new)
        served[both.claim(1)[0].model] += 1
    assert abs(served[full] - 20) <= 1


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_callers_share_alike(store: Store, batch: int) -> None:
    """Of two callers with ten to one in the queue, each gets half, until one has nothing left."""
    send(store, 3000, caller="alice")
    send(store, 300, caller="bob")
    served = Counter(caller_of(task) for _ in range(512 // batch) for task in store.claim(batch))
    assert abs(served["alice"] - served["bob"]) <= 0.05 * served.total() + 1
    while store.client.llen("realtime@bob"):
        store.claim(64)
    assert {caller_of(task) for task in store.claim(64)} == {"alice"}


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("weights", [{"alice": 3.0}, {"alice": 0.25}, {"alice": 2.0, "bob": 5.0}])
def test_callers_share_by_weight(store: Store, weights: dict[str, float], batch: int) -> None:
    """Ten to one in the queue or not: each has its weight's part; without a weight it is 1."""
    for command in weighing(weights, []):
        store.client.execute_command(*command)  # type: ignore[no-untyped-call]
    store.client.hset(keys.WEIGHTS, "carol", "much")
    for caller, count in (("alice", 3000), ("bob", 1000), ("carol", 1000)):
        send(store, count, caller=caller)
    served = Counter(caller_of(task) for _ in range(1024 // batch) for task in store.claim(batch))
    total = sum(weights.get(caller, 1.0) for caller in ("alice", "bob", "carol"))
    for caller in ("alice", "bob", "carol"):
        part = weights.get(caller, 1.0) / total
        assert served[caller] == pytest.approx(part * served.total(), abs=0.05 * served.total())


def test_who_is_nobody_has_a_turn_too(store: Store) -> None:
    """Tasks without a caller are a caller's, of weight 1."""
    store.client.hset(keys.WEIGHTS, "alice", "3")
    send(store, 500)
    send(store, 500, caller="alice")
    served = Counter(caller_of(task) for _ in range(50) for task in store.claim(4))
    assert served == {"alice": 150, "": 50}


def test_callers_share_within_a_priority_alone(store: Store) -> None:
    """A caller with urgent work goes before one without; and the tiers stand as they are."""
    low = send(store, 5, caller="alice", queue="batch")
    high = send(store, 5, caller="bob")
    assert ids(store.claim(5)) == high
    assert ids(store.claim(5)) == low


def test_a_single_caller_costs_nothing(store: Store) -> None:
    """As many commands as without one."""
    counts = []
    store.claim(1)
    for caller in ("", "alice"):
        send(store, 64, caller=caller)
        commands(store)
        assert len(store.claim(64)) == 64
        counts.append(commands(store))
    assert counts[0] == counts[1]
    assert not store.client.exists(keys.TURNS)


@pytest.mark.parametrize(("crowd", "single"), [("ant", "zebra"), ("zebra", "ant")])
def test_a_model_of_many_callers_is_one_model(both: Store, crowd: str, single: str) -> None:
    """Its callers share its turn; they do not have one each against another model."""
    for number in range(10):
        send(both, 40, model=crowd, caller=f"caller-{number}")
    send(both, 400, model=single)
    served = Counter(both.claim(10)[0].model for _ in range(20))
    assert served == {crowd: 10, single: 10}


def test_many_callers(store: Store) -> None:
    """However many wait at once: Lua passes eight thousand values to a command, and no more."""
    raw: Any = store.client
    with raw.pipeline(transaction=False) as pipe:
        for number in range(9000):
            pipe.lpush(f"realtime.digits@c{number}", message())
            pipe.zadd(keys.index("digits"), {f"realtime.digits@c{number}": 9})
        pipe.execute()
    assert len(store.claim(5)) == 5
    assert len(store.claim(5)) == 5


def test_callers_that_come_and_go_leave_nothing(both: Store) -> None:
    """What was claimed of theirs stays in the sum of their lane; the rest is as if it had never been."""
    raw: Any = both.client
    for number in range(20):
        send(both, 2, caller=f"caller-{number}", model=("digits", "ant")[number % 2])
    while both.claim(8):
        pass
    send(both, 3, caller="waits")
    both.claim(1)
    raw.hset(keys.TURNS, mapping={"realtime.ant@gone": 5, "realtime@waits": 1, "realtime.ant": 2})
    raw.hset(keys.RATES, mapping={"old": "1.5", "busy": repr(time.time() + 1e6)})
    raw.hset(keys.ROOM, mapping={"@alice 10 0": 4, "others 1 2": 3})
    before = read_depth(raw).claimed
    for _ in range(2):
        tidy(bind(raw, "tidy"))
        assert read_depth(raw).claimed == before
    assert set(raw.hkeys(keys.CLAIMED)) == {b"realtime.ant@*", b"realtime@* digits", b"realtime@waits digits"}
    assert raw.hkeys(keys.RATES) == [b"busy"]
    assert b"others 1 2" in raw.hkeys(keys.ROOM)
    assert b"@alice 10 0" not in raw.hkeys(keys.ROOM)
    assert set(raw.hkeys(keys.TURNS)) == {b"realtime@waits", b"realtime.ant"}
