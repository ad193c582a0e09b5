# SPDX-License-Identifier: Apache-2.0
"""What is passed over for long goes first now and then: each list does, in a fifth of the claims at most."""

from __future__ import annotations

import time

import pytest

from gpuinfer import Client
from gpuinfer.queue import keys
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, BrokerSettings
from tests.contract.conftest import on, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

MODELS = ("digits", "ocr")
#: What is passed over once has waited for long enough: longer than this, between two claims.
AGEING_S, BETWEEN_S = 0.001, 0.003


def starve(store: Store, client: Client, lists: int, tasks: int) -> list[str]:
    """Fill this many lists below the most urgent one; return their names."""
    places = [
        (queue, model, priority)
        for queue in reversed(QUEUES)
        for model in MODELS
        for priority in keys.PRIORITIES
        if (queue, priority) != ("realtime", 9)
    ][:lists]
    for queue, model, priority in places:
        client.submit_many([[1]] * tasks, queue=queue, model=model, priority=priority)
    return [
        keys.list_key(keys.queue_name(queue, model.replace("digits", "")), priority)
        for queue, model, priority in places
    ]


def serve(store: Store, client: Client, claims: int) -> list[tuple[str, bool]]:
    """Claim one by one while urgent work flows in; return from which lists, and whether they had aged."""
    served = []
    for _ in range(claims):
        client.submit([1], priority=9)
        (task,) = store.claim(1)
        served.append((task.list_key, task.aged))
        time.sleep(BETWEEN_S)
    return served


@pytest.mark.parametrize("lists", [3, 6, 11, 30])
def test_a_fifth_of_the_claims_at_most(broker: BrokerSettings, client: Client, lists: int) -> None:
    """However many lists are starved, urgent work keeps four of five claims, and each list has its turn."""
    store = store_of(broker, models=MODELS, ageing_s=AGEING_S)
    names = starve(store, client, lists, tasks=60)
    served = serve(store, client, 160)
    for first in range(0, 61, 20):
        assert sum(aged for _, aged in served[first : first + 100]) <= 20
    assert sum(aged for _, aged in served) >= 30
    assert {name for name, aged in served if aged} == set(names)
    assert {name for name, aged in served if not aged} == {keys.list_key("realtime", 9)}


def test_the_budget_is_the_fleets(broker: BrokerSettings, client: Client) -> None:
    """Several workers have one between them."""
    stores = [store_of(broker, f"gpu{number}@here", MODELS, ageing_s=AGEING_S) for number in range(3)]
    starve(stores[0], client, 11, tasks=60)
    aged = sum(is_aged for number in range(99) for _, is_aged in serve(stores[number % 3], client, 1))
    assert 15 <= aged <= 20


def test_one_that_has_aged_goes_first_in_the_next_claim(broker: BrokerSettings, client: Client) -> None:
    """Where none did of late, nobody waits for a fifth claim."""
    store = store_of(broker, models=MODELS, ageing_s=AGEING_S)
    (name,) = starve(store, client, 1, tasks=5)
    assert [aged for _, aged in serve(store, client, 7)] == [False, True, False, False, False, False, True]
    assert store.client.hexists(keys.AGEING_PREFIX + store.group, name)


def test_off(broker: BrokerSettings, client: Client) -> None:
    """Without ageing what is urgent goes first, for ever."""
    store = store_of(broker, models=MODELS, ageing_s=0)
    starve(store, client, 6, tasks=1)
    assert {name for name, _ in serve(store, client, 50)} == {keys.list_key("realtime", 9)}
    assert not store.client.exists(keys.AGEING_PREFIX + store.group)
