# SPDX-License-Identifier: Apache-2.0
"""Idle workers that serve the same share what comes; each is woken for its part, and the dead have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuinfer import Client
from gpuinfer.queue import keys
from gpuinfer.queue.claims import Want
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings
from tests.conftest import COUNTS_S
from tests.contract.conftest import ids, on, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

BATCH = 16
#: Seconds since an idle worker was seen that is gone.
GONE_S = COUNTS_S + 60
Fleet = Callable[[int], list[Store]]


@pytest.fixture
def fleet(broker: BrokerSettings) -> Fleet:
    """Make workers that serve the same, all of them idle."""
    made: list[Store] = []

    def build(count: int) -> list[Store]:
        made.extend(store_of(broker, f"gpu{number}@here") for number in range(len(made), count))
        for store in made[:count]:
            assert store.claim(BATCH, state="idle") == []
        return made[:count]

    return build


def now(store: Store) -> float:
    seconds, microseconds = store.client.time()
    return float(seconds + microseconds / 1e6)


def seen(store: Store, ago_s: float, *, woken: bool = False) -> None:
    """Let an idle worker have been seen, or woken, so long ago."""
    at = now(store) - ago_s
    store.client.zadd(keys.IDLE, {store.worker: at})
    store.client.zadd(keys.IDLE_PREFIX + store.group, {store.worker: -at if woken else at})


def rung(stores: list[Store]) -> list[int]:
    """Return how many wake-ups lie with each."""
    return [int(store.client.llen(keys.wake(store.worker))) for store in stores]


def shares(stores: list[Store]) -> list[int]:
    """Let them claim, one after the other; return how many tasks each has got."""
    return [len(store.claim(BATCH, state="idle")) for store in stores]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w * BATCH))), st.booleans())
def test_a_burst_is_shared(fleet: Fleet, client: Client, burst: tuple[int, int], dead: bool) -> None:
    """All idle workers are woken and get shares within one of each other; one that died has none."""
    workers, count = burst
    stores = fleet(workers + 1)
    stores[0].client.flushdb()
    for store in stores:
        store.register(default="digits")
    stores = fleet(workers + 1) if dead else fleet(workers)
    if dead:
        seen(stores[0], GONE_S)
        stores = stores[1:]
    client.submit_many([[1]] * count)
    assert (sum(rung(stores)), max(rung(stores))) == (min(count, workers), 1)
    got = shares(stores)
    assert sum(got) == count
    assert max(got) - min(got) <= 1


def test_a_share_is_worth_a_batch(fleet: Fleet, client: Client) -> None:
    """What is less than the least batch is not split further, and the others have what is left."""
    stores = fleet(4)
    client.submit_many([[1]] * 20)
    wants = {"digits": Want(BATCH, least=8)}
    assert [len(store.claim(wants, state="idle")) for store in stores] == [8, 8, 4, 0]


def test_an_empty_index_hides_nothing(broker: BrokerSettings, client: Client) -> None:
    """Of two models whose lists were indexed, one was emptied by hand: the other's work is found."""
    both = store_of(broker, models=("a", "b"), default="a")
    client.submit([1], model="a", priority=9)
    task = client.submit([1], model="b")
    both.client.delete(keys.list_key("realtime", 9))
    assert both.claim(BATCH, state="idle") == []
    assert rung([both]) == [1]
    assert ids(both.claim(BATCH, state="idle")) == [task]


def test_the_busy_leave_the_idle_their_part(fleet: Fleet, client: Client) -> None:
    """Who runs a batch claims what the idle could not take in a batch each."""
    first, *others = fleet(3)
    client.submit_many([[1]])
    assert len(first.claim(1, state="idle")) == 1
    for count, left in ((2 * BATCH, 0), (5, 5), (BATCH, BATCH)):
        client.submit_many([[1]] * count)
        assert len(first.claim(BATCH, state="busy")) == left
    assert sum(shares(others)) == 2 * BATCH
    client.submit_many([[1]] * 5)
    assert len(first.claim(BATCH, state="busy")) == 5, "nobody is idle"


def test_who_was_woken_counts_for_a_moment(fleet: Fleet, client: Client) -> None:
    """It is about to claim; if it does not, its part is the others'."""
    first, second = fleet(2)
    client.submit_many([[1]] * 8)
    seen(second, 0, woken=True)
    assert len(first.claim(BATCH)) == 4
    seen(second, GONE_S, woken=True)
    assert len(first.claim(BATCH)) == 4


def test_each_submission_wakes_another_worker(fleet: Fleet, client: Client) -> None:
    """The one seen last first; and one that was woken is not woken again before it has claimed."""
    stores = fleet(3)
    for count in range(1, 5):
        client.submit([1])
        assert sum(rung(stores)) == min(count, 3)
        assert max(rung(stores)) == 1
    assert shares(stores) == [2, 1, 1]
    assert stores[0].claim(1, state="idle") == []
    stores[0].client.delete(*(keys.wake(store.worker) for store in stores))
    client.submit([1])
    assert rung(stores) == [1, 0, 0]


def test_the_dead_are_not_woken(fleet: Fleet, client: Client) -> None:
    """An entry that was not renewed for two waits is void."""
    stores = fleet(2)
    seen(stores[1], GONE_S)
    client.submit([1])
    assert rung(stores) == [1, 0]


def test_a_woken_worker_that_never_claims(fleet: Fleet, client: Client) -> None:
    """Another one finds the task by its look, and takes it."""
    first, second = fleet(2)
    task = client.submit([1])
    (idle,) = [
        store for store, count in zip((first, second), rung([first, second]), strict=True) if not count
    ]
    assert idle.waits()
    assert ids(idle.claim(BATCH, state="idle")) == [task]


def test_what_is_left_wakes_the_next(broker: BrokerSettings, client: Client) -> None:
    """A claim that leaves work behind wakes an idle worker, be it of the same model or of another."""
    both = store_of(broker, "gpu0@here", ("digits", "ocr"))
    others = [store_of(broker, f"{model}@here", (model,)) for model in ("digits", "ocr")]
    client.submit_many([[1]] * 10)
    client.submit_many([[1]] * 10, model="ocr")
    for other in others:
        seen(other, 0.1)
    for model in ("digits", "ocr"):
        assert {task.model for task in both.claim(9)} == {model}
    assert rung(others) == [1, 1]


def test_who_leaves_is_not_woken(fleet: Fleet, client: Client) -> None:
    """A worker that ends in order is out of the idle set at once."""
    stores = fleet(2)
    stores[1].leave()
    client.submit_many([[1]] * 4)
    assert rung(stores) == [1, 0]
    assert len(stores[0].claim(BATCH, state="idle")) == 4
