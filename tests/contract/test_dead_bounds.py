# SPDX-License-Identifier: Apache-2.0
"""Dead letters are bounded by their number, their bytes and their age; what falls out is named in the log."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.errors import DeadLettered
from gpuinfer.queue import dead, keys
from gpuinfer.queue.store import Store
from gpuinfer.settings import QueueSettings
from tests.contract.conftest import ids, on

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]


def bury(store: Store, client: Client, count: int, size: int = 1) -> list[str]:
    """Set tasks aside; return their ids, the oldest first."""
    client.submit_many([["x" * size]] * count)
    tasks = store.claim(count)
    for task in tasks:
        store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"))
    return ids(tasks)


def bounded(store: Store, **bounds: int) -> Store:
    store.burial._settings = QueueSettings.model_validate({"ageing_s": 0, **bounds})
    return store


def left(store: Store) -> set[str]:
    """Return the ids of the letters there are; their accounts agree."""
    raw: Any = store.client
    found = {name.decode(): len(text) for name, text in raw.hgetall(keys.DEAD).items()}
    assert {name.decode() for name in raw.zrange(keys.DEAD_AGES, 0, -1)} == set(found)
    bodies = sum(raw.strlen(keys.body(letter)) for letter in found)
    assert int(raw.get(keys.DEAD_BYTES) or 0) == sum(found.values()) + bodies
    return set(found)


def dropped(logs: Any) -> list[str]:
    return [name for entry in logs if entry["event"] == "dead_letters_dropped" for name in entry["task_ids"]]


def test_number(store: Store, client: Client) -> None:
    """The oldest go, and are named; what failed stays failed."""
    bounded(store, max_dead=3)
    with capture_logs() as logs:
        letters = bury(store, client, 5)
    assert left(store) == set(letters[2:])
    assert dropped(logs) == letters[:2]
    assert client.status(letters[0]).state == "failed"


def test_many_at_once(store: Store, client: Client) -> None:
    """A bound that was lowered is held at the next look, in calls of a hundred."""
    letters = bury(store, client, 250)
    with capture_logs() as logs:
        bounded(store, max_dead=10).burial.trim()
    assert len(left(store)) == 10
    assert [len(entry["task_ids"]) for entry in logs] == [100, 100, 40]
    assert set(dropped(logs)) | left(store) == set(letters)


def test_bytes(store: Store, client: Client) -> None:
    """Large letters push others out; one that is over the bound by itself stays, until the next comes."""
    bounded(store, max_dead_bytes=20_000)
    small = bury(store, client, 4)
    (large,) = bury(store, client, 1, 19_000)
    assert left(store) < {*small, large}
    assert large in left(store)
    (larger,) = bury(store, client, 1, 50_000)
    assert left(store) == {larger}


def test_large_bodies(store: Store, client: Client) -> None:
    """The body that lies beside counts, and goes with its letter; with one that is retried it stays."""
    tasks = client.submit_many([[1]] * 3)
    for task, claimed in zip(tasks, store.claim(3), strict=True):
        store.client.set(keys.body(task), "x" * 5_000)
        store.bury(claimed.seq, claimed.list_key, claimed.payload, DeadLettered("no"))
    bounded(store, max_dead_bytes=13_000).burial.trim()
    assert left(store) == set(tasks[1:])
    dead.retry(store.client, tasks[1])
    assert dead.drop(store.client, [tasks[2]]) == 1
    assert left(store) == set()
    assert [bool(store.client.exists(keys.body(task))) for task in tasks] == [False, True, False]


def test_age(store: Store, client: Client) -> None:
    """By the time a look comes, what is too old goes."""
    old, new = bury(store, client, 2)
    store.client.zincrby(keys.DEAD_AGES, -100, old)
    with capture_logs() as logs:
        bounded(store, dead_ttl_s=60).burial.trim()
    assert left(store) == {new}
    assert dropped(logs) == [old]


def test_accounts(store: Store, client: Client) -> None:
    """Dropped, retried and buried again: number and bytes are right all the way."""
    first, second, third = bury(store, client, 3)
    assert left(store) == {first, second, third}
    assert dead.drop(store.client, [first, "nothing"]) == 1
    dead.retry(store.client, second)
    assert left(store) == {third}
    for task in store.claim(1):
        store.bury(task.seq, task.list_key, task.payload, DeadLettered("again, and in more words"))
    assert left(store) == {second, third}
    assert dead.drop(store.client, [second, third]) == 2
    assert left(store) == set()
