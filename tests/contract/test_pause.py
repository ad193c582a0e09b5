# SPDX-License-Identifier: Apache-2.0
"""The contract of paused queues, and of keys that are not ours: each stops its own list, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.errors import BrokerError
from gpuinfer.queue import keys
from gpuinfer.queue.depth import Lane
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.purge import set_paused
from gpuinfer.queue.store import Store
from tests.contract.conftest import ids, message, on, send

pytestmark = [pytest.mark.integration, on("redis-socket")]


def test_nothing_is_claimed_from_a_paused_queue(store: Store, client: Client) -> None:
    """A tier is all its models; what is sent there is accepted; the other tiers go on."""
    assert set_paused(store.client, "realtime", paused=True)
    assert not set_paused(store.client, "realtime", paused=True)
    wanted, other = send(store, 2), send(store, 1, queue="batch")
    store.client.lpush("realtime", message())
    assert ids(store.claim(9, search=True)) == other
    assert not store.waits()  # nobody looks there again and again
    assert store.claim(9, state="idle") == []
    depth = read_depth(store.client)
    assert depth.paused == ("realtime",)
    assert depth.is_paused(Lane("realtime", "digits"))
    assert depth.total_waiting == 3
    assert set_paused(store.client, "realtime", paused=False)
    raw: Any = store.client
    assert raw.llen(keys.wake(store.worker)) == 1  # who is idle hears of it
    assert store.waits()
    assert ids(store.claim(9))[:2] == wanted
    assert not raw.exists(keys.PAUSED)


def test_one_model_of_a_tier_is_paused(store: Store, client: Client) -> None:
    """By its name, though it is the default one, whose lists have none."""
    set_paused(store.client, "batch.digits", paused=True)
    set_paused(store.client, "realtime.ocr", paused=True)
    (task_id,) = send(store, 1)
    send(store, 1, queue="batch")
    assert ids(store.claim(9)) == [task_id]
    assert read_depth(store.client).paused == ("batch.digits", "realtime.ocr")
    set_paused(store.client, "realtime.ocr", paused=False)
    assert read_depth(store.client).paused == ("batch.digits",)


@pytest.mark.parametrize("name", ["realtime", "default\x06\x163", keys.index(), keys.index("digits")])
def test_a_foreign_key_stops_its_own_list_alone(store: Store, name: str) -> None:
    """A set, or a text, under a name of ours: other lists are served, heartbeats go on, and it is named."""
    raw: Any = store.client
    if name == "realtime":
        raw.sadd(name, "a stranger's")
    else:
        raw.set(name, "a stranger's")
    wanted = send(store, 1, model="digits", queue="batch") if name != keys.index() else []
    raw.lpush("realtime\x06\x169", message())
    came = store.claim(9, search=True) + store.claim(9, search=True)
    assert set(wanted) <= set(ids(came)) or name == keys.index("digits")
    assert bool(came) == (name != keys.index())
    store.register(b'{"state":"idle"}')
    assert read_depth(raw).foreign == {name: "set" if name == "realtime" else "string"}
    if not name.startswith("gpuinfer:"):
        assert store.waits()
        assert store.plain.foreign() == {name: "set" if name == "realtime" else "string"}
        assert store.plain.foreign() == {}
        assert not store.waits()


def test_what_cannot_be_queued_leaves_nothing_behind(store: Store, client: Client) -> None:
    """A submission to a list whose name a foreign key has: an error, and no state that waits for ever."""
    raw: Any = store.client
    raw.set("realtime", "a stranger's")
    before = set(raw.keys())
    for value in ([1], "x" * 100_000):  # the second with a body beside the list
        with pytest.raises(BrokerError, match="WRONGTYPE"):
            client.submit(value, idempotency_key="k")
    assert set(raw.keys()) - before <= {keys.ROOM.encode(), keys.ORIGINS.encode()}
