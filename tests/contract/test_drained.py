# SPDX-License-Identifier: Apache-2.0
"""The contract of drained workers: they claim nothing until they are resumed, and nobody counts on them."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer.queue import keys
from gpuinfer.queue.drained import known, names, set_drained
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings
from tests.contract.conftest import done, ids, message, on, send, store_of

pytestmark = [pytest.mark.integration, on("redis-socket")]


def test_a_drained_worker_claims_nothing(store: Store, broker: BrokerSettings) -> None:
    """What it holds it ends; what comes is another's, at once and whole; so it is for its next process."""
    other = store_of(broker, "gpu1@here")
    (first,) = send(store, 1)
    (held,) = store.claim(1)
    assert set_drained(store.client, store.worker, drained=True)
    assert not set_drained(store.client, store.worker, drained=True)
    assert (store.is_drained(), other.is_drained()) == (True, False)
    wanted = send(store, 3)
    store.client.lpush("realtime", message())
    assert store.claim(9, state="idle", search=True) == []
    store.settle([done(held)])
    assert ids([held]) == [first]
    again = store_of(broker, store.worker)
    again.restore()
    assert again.claim(9, state="idle") == []
    assert ids(other.claim(9, state="idle"))[:3] == wanted
    assert names(store.client) == [store.worker]
    assert known(store.client) == ["gpu0@here", "gpu1@here"]


def test_nobody_wakes_it(store: Store, broker: BrokerSettings) -> None:
    """Idle when it is drained, it is woken once, to find out; a task then wakes another one."""
    raw: Any = store.client
    other = store_of(broker, "gpu1@here")
    assert store.claim(9, state="idle") == other.claim(9, state="idle") == []
    assert raw.zcard(keys.IDLE) == 2
    set_drained(raw, other.worker, drained=True)
    assert raw.lpop(keys.wake(other.worker)) == b"1"
    assert other.claim(9, state="idle") == []
    assert raw.zrange(keys.IDLE, 0, -1) == [store.worker.encode()]
    assert raw.zcard(keys.IDLE_PREFIX + store.group) == 1
    (task_id,) = send(store, 1)
    assert (raw.llen(keys.wake(store.worker)), raw.llen(keys.wake(other.worker))) == (1, 0)
    assert ids(store.claim(9, state="idle")) == [task_id]


def test_resumed_it_is_woken(store: Store) -> None:
    """It claims at once what has come meanwhile; no key is left; a name nobody has is woken by nobody."""
    raw: Any = store.client
    for worker in (store.worker, "gpu9@away"):
        assert set_drained(raw, worker, drained=True)
    raw.delete(keys.wake(store.worker))
    wanted = send(store, 2)
    assert store.claim(9, state="idle") == []
    for worker in (store.worker, "gpu9@away"):
        assert set_drained(raw, worker, drained=False)
    assert not set_drained(raw, store.worker, drained=False)
    assert raw.llen(keys.wake(store.worker)) == 1
    assert ids(store.claim(9, state="idle")) == wanted
    assert raw.exists(keys.DRAINED, keys.wake("gpu9@away")) == 0
