# SPDX-License-Identifier: Apache-2.0
"""The index of lists that hold work: what enters it, what leaves it, and what a claim costs by it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from gpuinfer import Client
from gpuinfer.queue import keys
from gpuinfer.queue.keys import Place
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, BrokerSettings
from tests.contract.conftest import commands, ids, message, on, send, store_of
from tests.unit.test_keys import PLACES

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLACES)
def test_the_scripts_read_coordinates_as_we_do(store: Store, place: Place) -> None:
    """A list enters the index of its model, with its rank."""
    store.client.flushdb()
    key = keys.list_key(keys.queue_name(place.tier, place.model, place.caller), place.priority)
    store.client.lpush(key, b"x")
    assert store.plain._index(keys=[key, "celery", "realtimes"], args=()) == 1
    found = store.client.zrange(keys.index(place.model), 0, -1, withscores=True)
    rank = 10 * QUEUES.index(place.tier) + 9 - place.priority
    assert found == [(key.encode(), float(rank))]


def test_a_list_is_indexed_while_it_holds_work(store: Store, client: Client) -> None:
    """It enters with its first task and leaves with its last, and leaves nothing behind."""
    client.submit([1], priority=3)
    send(store, 2, caller="alice"), send(store, 2, caller="bob")
    assert store.client.zcard(keys.index()) == 3
    while store.claim(2):
        pass
    raw: Any = store.client
    left = {key.decode() for key in raw.keys("gpuinfer:*")}
    assert not {key for key in left if key.startswith((keys.INDEX_PREFIX, keys.ORDER_PREFIX, keys.TURNS))}


def test_a_plain_producers_list_enters_by_a_look(store: Store) -> None:
    """Who only appends tells nobody; the timer looks, and so does a claim that is told to."""
    store.client.lpush("batch", message())
    assert store.claim(1) == []
    assert store.waits()
    assert store.plain.index() == 1
    assert len(store.claim(1)) == 1
    store.client.lpush("default\x06\x163", message())
    assert store.claim(1) == []
    (task,) = store.claim(1, search=True)
    assert (task.list_key, task.model) == ("default\x06\x163", "digits")


def test_a_list_that_somebody_has_deleted(store: Store, client: Client) -> None:
    """It is no more, and the next ones are found as ever."""
    client.submit([1], priority=9)
    store.client.delete(keys.list_key("realtime", 9))
    other = client.submit([1])
    assert ids(store.claim(1)) + ids(store.claim(1)) == [other]
    assert not store.client.exists(keys.index())
    again = client.submit([1], priority=9)
    assert ids(store.claim(1)) == [again]


@pytest.mark.parametrize("model", ["digits", "ocr"])
def test_an_index_that_somebody_has_deleted(broker: BrokerSettings, client: Client, model: str) -> None:
    """A look finds what waits, of any model."""
    store = store_of(broker, models=("digits", "ocr"))
    task = client.submit([1], model=model, queue="batch")
    store.client.delete(keys.index(), keys.index(model), keys.INDEXED)
    assert store.claim(1) == []
    assert store.waits()
    assert ids(store.claim(1, search=True)) == [task]


def test_a_claim_costs_the_same_with_many_models(broker: BrokerSettings, client: Client) -> None:
    """Empty lists cost nothing: Redis runs as many commands for one model as for twenty."""
    counts: dict[tuple[int, bool], int] = {}
    for models in (1, 20):
        names = ("digits", *(f"model-{number}" for number in range(models - 1)))
        store = store_of(broker, f"gpu{models}@here", names, ageing_s=30)
        store.claim(1)
        for waits in (False, True):
            if waits:
                client.submit_many([[1]] * 8, model="digits")
            commands(store)
            assert len(store.claim(8)) == 8 * waits
            counts[models, waits] = commands(store)
    for waits in (False, True):
        assert counts[20, waits] <= 1.3 * counts[1, waits]
