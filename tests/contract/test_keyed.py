# SPDX-License-Identifier: Apache-2.0
"""Idempotency keys: one key, one request, one task; for their time, and however full Redis gets."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from gpuinfer import Client
from gpuinfer.client import calls, submissions
from gpuinfer.errors import DeadLettered, IdempotencyConflict, QueueFull, TaskExpired
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.purge import lines, purge
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, QueueSettings, Settings
from tests.contract.conftest import done, ids, on

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-socket")]

IMAGE = np.zeros((3, 100, 100), np.float32)


def test_another_request(client: Client, store: Store) -> None:
    """Other inputs, or other options, under a key that stands: refused, and nothing is left."""
    first = client.submit([1], idempotency_key="k")
    large = client.submit(IMAGE, idempotency_key="large")
    for inputs, options in (
        ([2], {}),
        (IMAGE, {}),
        ([1], {"top_k": 2}),
        ([1], {"queue": "batch"}),
        ([1], {"priority": 1}),
        ([1], {"expires_s": 5}),
        ([1], {"model": "digits"}),
    ):
        with pytest.raises(IdempotencyConflict) as caught:
            client.submit(inputs, idempotency_key="k", **options)
        assert (caught.value.code, caught.value.http_status) == ("idempotency_conflict", 422)
        assert caught.value.field == "idempotency_key"
    with pytest.raises(IdempotencyConflict):
        client.submit(IMAGE + 1, idempotency_key="large")
    with pytest.raises(IdempotencyConflict):
        client.submit_batch([1], idempotency_key="k")
    assert client.submit([1], idempotency_key="k", top_k=None) == first
    assert client.submit(IMAGE, idempotency_key="large") == large
    assert ids(store.claim(10)) == [first, large]
    assert list(store.client.scan_iter(f"{keys.BODY_PREFIX}*")) == [keys.body(large).encode()]


def test_another_default_model_is_no_other_request(client: Client, store: Store) -> None:
    """A repeated request that names no model is the same one, whatever the default has become."""
    first = client.submit([1], idempotency_key="k")
    store.client.zadd(keys.CATALOGUE, {"another": time.time()})
    store.client.set(keys.DEFAULT_MODEL, "another")
    with Client(client._settings) as again:
        assert again.submit([1], idempotency_key="k") == first


def test_it_outlives_the_task(client: Client, store: Store) -> None:
    """It holds when nothing is kept of the task, and when the result was evicted."""
    first = client.submit([1], idempotency_key="k", ignore_result=True)
    second = client.submit([1], idempotency_key="k2")
    store.settle([done(task) for task in store.claim(2)])
    store.client.delete(keys.result(first), keys.result(second))
    assert client.submit([1], idempotency_key="k", ignore_result=True) == first
    assert client.submit([1], idempotency_key="k2") == second
    assert store.claim(1) == []


def test_it_is_never_evicted(broker: BrokerSettings, store: Store) -> None:
    """Redis fills up with results that expire, and drops some; no key goes."""
    store.client.config_set("maxmemory", 8_000_000)
    store.client.config_set("maxmemory-policy", "volatile-ttl")
    with Client(Settings(broker=broker)) as client:
        first = client.submit([1], idempotency_key="k")
        for number in range(400):
            store.client.set(f"{keys.RESULT_PREFIX}{number}", "x" * 50_000, ex=3600)
        assert store.client.info("stats")["evicted_keys"] > 0
        assert client.submit([1], idempotency_key="k") == first


def test_each_caller_has_his_own(store: Store) -> None:
    """The same key of two callers stands for two requests."""
    submit = bind(store.client, "submit")
    holders = []
    for caller, value in (("alice", 1), ("bob", 2), ("alice", 1)):
        task = submissions.build([value], many=False, idempotency_key="k")
        task = type(task)(**{name: getattr(task, name) for name in task.__slots__} | {"caller": caller})
        call = calls.one(task, QueueSettings())
        holders.append(submit(args=call.args))
    assert holders[0] == holders[2] != holders[1]


def test_it_expires(broker: BrokerSettings, store: Store) -> None:
    """After its time, not before; what has expired goes with its period. By the times that are noted."""

    def pass_time(seconds: int) -> None:
        for name in (keys.KEYED, keys.KEYED_BEFORE):
            found: Any = store.client.hgetall(name)
            for key, value in found.items():
                begun, _, rest = value.partition(b" ")
                earlier = value[:32] + b"%010d" % (int(value[32:42]) - seconds) + value[42:] if key else None
                store.client.hset(name, key, earlier or b"%d %s" % (int(begun) - seconds, rest))

    with Client(Settings(broker=broker, queue=QueueSettings(idempotency_ttl_s=600))) as client:
        first = client.submit([1], idempotency_key="k")
        assert client.submit([1], idempotency_key="k") == first
        pass_time(500)
        assert client.submit([1], idempotency_key="k") == first
        pass_time(101)
        assert client.submit([1], idempotency_key="k") != first
        for key in ("a", "b"):
            pass_time(601)
            client.submit([1], idempotency_key=key)
        fields = store.client.hkeys(keys.KEYED) + store.client.hkeys(keys.KEYED_BEFORE)
        assert call_key("k") not in fields
    assert store.client.ttl(keys.KEYED) == -1


def call_key(key: str) -> bytes:
    """Return the field of a caller's key."""
    return submissions.build([1], many=False, idempotency_key=key).keyed.encode()


def test_there_is_a_bound(broker: BrokerSettings, store: Store) -> None:
    """Only max_keys new keys in a period; old ones still hold, and requests without a key are taken."""
    with Client(Settings(broker=broker, queue=QueueSettings(max_keys=3))) as client:
        held = [client.submit([1], idempotency_key=str(number)) for number in range(3)]
        with pytest.raises(QueueFull, match=r"the limit is 3 \(queue.max_keys"):
            client.submit([1], idempotency_key="another")
        assert [client.submit([1], idempotency_key=str(number)) for number in range(3)] == held
        last = client.submit([1])
    assert ids(store.claim(10)) == [*held, last]


def test_a_bound_that_is_raised_counts_at_once(broker: BrokerSettings, store: Store) -> None:
    """And so does one that is lowered: by the setting of who asks, and by the memory there is now."""

    def submit(most: int, *names: str) -> None:
        with Client(Settings(broker=broker, queue=QueueSettings(max_keys=most))) as client:
            for name in names:
                client.submit([1], idempotency_key=name)

    submit(2, "a", "b")
    with pytest.raises(QueueFull):
        submit(2, "c")
    submit(3, "c")
    with pytest.raises(QueueFull, match="the limit is 2 "):
        submit(2, "d")
    store.client.config_set("maxmemory", 16_000_000)
    begun, length, _ = str((store.client.hget(keys.KEYED, "") or b"").decode()).split()  # type: ignore[union-attr]
    store.client.hset(keys.KEYED, "", f"{begun} {length} 3")
    submit(10_000, "d")
    store.client.hset(keys.KEYED, mapping={str(number): "x" for number in range(5000)})
    with pytest.raises(QueueFull, match="the limit is 5000 "):
        submit(10_000, "e")
    store.client.config_set("maxmemory", 17_000_000)
    submit(10_000, "e")


def test_they_take_a_part_of_the_memory(broker: BrokerSettings, store: Store) -> None:
    """A small Redis has room for fewer: what keys take is never what fills it."""
    store.client.config_set("maxmemory", 10_000_000)
    with Client(Settings(broker=broker)) as client:
        client.submit([1], idempotency_key="k")
    most = int(str(store.client.hget(keys.KEYED, "").decode()).split()[2])  # type: ignore[union-attr]
    assert most == 10_000_000 // 16 // keys.KEYED_BYTES


def test_who_did_not_run_frees_them_for_good(client: Client, store: Store) -> None:
    """Cancelled, or too late: as long as its state stands, and when that has expired before the key."""

    def submit(key: str) -> str:
        return client.submit([1], idempotency_key=key)

    names = ["skipped", "late", "expired", "not kept", "buried"]
    sent = [submit(name) for name in names]
    ran = submit("ran")
    skipped, late, expired, unkept, buried, other = store.claim(6)
    for task_id in (sent[0], sent[1], sent[4]):
        assert client.cancel(task_id)
    again = submit("late")
    assert again != sent[1]

    def too_late(task: Claimed) -> Final:
        task_id = ids([task])[0]
        return Final(task.seq, task_id, results.failure(task_id, TaskExpired("late"), worker="w"))

    ends = [Final(skipped.seq, "", b"", parent=sent[0]), done(late), too_late(expired)]
    store.settle([*ends, too_late(unkept)._replace(keep=False), done(other)])
    store.bury(buried.seq, buried.list_key, buried.payload, DeadLettered("x"))
    store.client.delete(*map(keys.result, (*sent, ran)))
    assert submit("late") == again
    assert submit("ran") == ran
    assert [name for name, task_id in zip(names, sent, strict=True) if submit(name) == task_id] == []


def test_who_did_not_run_frees_them(client: Client, store: Store) -> None:
    """What was purged or cancelled may be asked for again, however long ago that was."""
    for ignore in (False, True):
        purged = client.submit([1], idempotency_key="k", ignore_result=ignore)
        cancelled = client.submit([1], idempotency_key="k2", ignore_result=ignore)
        assert client.cancel(cancelled)
        assert client.submit([1], idempotency_key="k2", ignore_result=ignore) != cancelled
        assert purge(store.client, lines(store.client), QueueSettings()) == 3
        store.client.delete(keys.result(purged))
        again = client.submit([1], idempotency_key="k", ignore_result=ignore)
        assert again != purged
        assert ids(store.claim(10)) == [again]
        store.client.delete(keys.KEYED)
