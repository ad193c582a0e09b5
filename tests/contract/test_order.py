# SPDX-License-Identifier: Apache-2.0
"""The order in which a group of workers serves several models: kept in Redis, right for each group."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer.queue import keys
from gpuinfer.queue.claims import Want
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings
from tests.contract.conftest import commands, ids, message, on, send, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

NAMES = tuple(f"model-{number:02}" for number in range(20))


def order(store: Store) -> list[str]:
    raw: Any = store.client
    return [name.decode() for name in raw.zrange(keys.ORDER_PREFIX + store.group, 0, -1)]


@pytest.mark.parametrize("count", [1, 8])
def test_a_claim_costs_the_same_when_all_are_busy(broker: BrokerSettings, count: int) -> None:
    """Redis runs as many commands for twenty models with work as for two, and few more than for one."""
    counts = {}
    for models in (1, 2, 20):
        store = store_of(broker, f"gpu{models}@here", NAMES[:models], ageing_s=30)
        store.client.flushdb()
        store.register(default="digits")
        for model in NAMES[:models]:
            send(store, 40, model=model)
        store.claim(count)  # begins the epoch, looks for what has aged
        store.client.persist(keys.AGED_PREFIX + store.group)  # and will not look again, however late it is
        commands(store)
        assert len(store.claim(count)) == count
        counts[models] = commands(store)
    assert counts[20] == counts[2] <= counts[1] + 2


def test_what_another_group_has_emptied(broker: BrokerSettings) -> None:
    """It stands in this one's order still; the claim that meets it goes on to the next."""
    store = store_of(broker, models=("ant", "bee", "cat"), default="ant")
    other = store_of(broker, "gpu1@here", ("ant", "bee"), default="ant")
    send(store, 2, model="bee")
    last = send(store, 1, model="cat", queue="batch")
    while other.claim(1):
        pass
    assert order(store) == ["bee", "cat"]
    assert ids(store.claim(1)) == last
    assert order(store) == []


def test_what_is_less_urgent_than_it_was(broker: BrokerSettings) -> None:
    """Another group has taken a model's urgent tasks: what is left has the place of its rank."""
    store = store_of(broker, models=("ant", "bee", "cat"), default="ant")
    other = store_of(broker, "gpu1@here", ("bee",), default="ant")
    send(store, 1, model="bee")
    low = send(store, 1, model="bee", queue="batch")
    middle = send(store, 1, model="cat", queue="default")
    other.claim(1)
    assert [ids(store.claim(8)) for _ in range(3)] == [middle, low, []]


def test_a_group_that_comes_later(broker: BrokerSettings) -> None:
    """It finds what waits, in the order of serving, for its own models and tiers alone."""
    first = store_of(broker, models=("ant", "bee", "cat"), default="ant")
    low = send(first, 1, model="bee", queue="batch")
    high = send(first, 1, model="cat", queue="default")
    send(first, 1, model="ant"), send(first, 1, model="cat")
    late = store_of(broker, "gpu1@here", ("bee", "cat"), default="ant")
    late.serve(["default", "batch"])
    late.register()
    assert order(late) == ["cat", "bee"]
    assert [ids(late.claim(8)) for _ in range(3)] == [high, low, []]


def test_what_is_not_wanted_now(broker: BrokerSettings) -> None:
    """A model that this worker has enough of, or whose tasks are not urgent enough, holds nobody up."""
    store = store_of(broker, models=NAMES, default="digits")
    sent = {model: send(store, 1, model=model, queue="default") for model in NAMES}
    wanted = NAMES[13]
    assert ids(store.claim({wanted: Want(4)})) == sent[wanted]
    wants = {model: Want(4, better_than=10 if number != 7 else 20) for number, model in enumerate(NAMES)}
    assert ids(store.claim(wants)) == sent[NAMES[7]]
    assert store.claim(store.wants(4, better_than=10)) == []


def test_the_default_models_lists(broker: BrokerSettings) -> None:
    """They are the new default model's from the next heartbeat at the latest."""
    store = store_of(broker, models=("ant", "bee"), default="ant")
    other = store_of(broker, "gpu1@here", ("cat", "dog"), default="ant")
    store.client.lpush("realtime", message())
    store.plain.index()
    assert (order(store), order(other)) == ([""], [])
    store.client.set(keys.DEFAULT_MODEL, "cat")
    assert store.claim(1) == []
    for one in (store, other):
        one.register()
    assert (order(store), order(other)) == ([], [""])
    assert [task.model for task in other.claim(1)] == ["cat"]


def test_a_group_that_is_gone_leaves_nothing(broker: BrokerSettings) -> None:
    """Its order goes when it is forgotten."""
    store = store_of(broker, models=("ant", "bee"), default="ant")
    send(store, 1, model="bee")
    raw: Any = store.client
    for name in raw.keys(keys.GROUPS_PREFIX + "*"):
        raw.zadd(name, {store.group: 1})
    assert raw.exists(keys.ORDER_PREFIX + store.group)
    store_of(broker, "gpu1@here", ("bee",), default="ant")
    assert not raw.exists(keys.ORDER_PREFIX + store.group)
