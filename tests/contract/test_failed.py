# SPDX-License-Identifier: Apache-2.0
"""A task that failed can be sent again with its inputs, for as long as these are kept, within bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuinfer import Client
from gpuinfer.client import calls, submissions
from gpuinfer.errors import InputError, TaskFailed, TaskNotFound, WaitTimeout, WrongState
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.message import decode
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, QueueSettings, Settings
from tests.contract.conftest import done, ids, on, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

IMAGE = np.zeros((3, 100, 100), np.float32)


def failed(task: Claimed) -> Final:
    task_id, place = decode(task.payload).id, keys.place_of(task.list_key)
    meta = results.failure(task_id, TaskFailed("no"), worker="w", caller=place.caller)
    return Final(task.seq, task_id, meta, label="failed realtime digits")


def fail(store: Store, count: int = 1) -> list[str]:
    """Let what waits fail; return the ids."""
    tasks = store.claim(count)
    store.settle([failed(task) for task in tasks])
    return ids(tasks)


def kept(store: Store) -> set[str]:
    """Return whose inputs are kept; the accounts agree with what is there."""
    raw: Any = store.client
    letters = {name.decode(): value for name, value in raw.hgetall(keys.FAILED).items()}
    assert {name.decode() for name in raw.zrange(keys.FAILED_AGES, 0, -1)} == set(letters)
    size = sum(len(value) + raw.strlen(keys.body(name)) for name, value in letters.items())
    assert int(raw.get(keys.FAILED_BYTES) or 0) == size
    assert {key.decode() for key in raw.scan_iter(f"{keys.BODY_PREFIX}*")} <= set(map(keys.body, letters))
    return set(letters)


@pytest.mark.parametrize("inputs", [[1, 2], IMAGE])
@pytest.mark.parametrize("beside", [0, 3])
def test_again(client: Client, store: Store, inputs: Any, beside: int) -> None:
    """It waits again under its id, with all that was sent; and may fail, and be sent, once more."""
    task_id = client.submit(inputs, priority=9, metadata={"a": "b"})
    before = client.status(task_id)
    client.submit_many([[1]] * beside, priority=9)
    for _ in range(2):
        assert fail(store, 1 + beside)[0] == task_id
        assert task_id in kept(store)
        assert client.status(task_id).state == "failed"
        with pytest.raises(TaskFailed):
            client.result(task_id)
        client.retry(task_id)
        found = client.status(task_id)
        assert (found.state, found.sent_at) == ("queued", before.sent_at)
        assert found.about == {**before.about, "place": found.about["place"]}
        assert not store.client.hexists(keys.FAILED, task_id)
        with pytest.raises(WrongState, match="has not ended"):
            client.retry(task_id)
        beside = 0
    (task,) = store.claim(1)
    envelope = decode(task.payload)
    if envelope.beside:
        assert len(store.body(task_id) or b"") == envelope.beside
    store.settle([done(task)])
    assert client.result(task_id) == 1
    assert store.client.hlen(keys.BODIES) == 0
    assert task_id not in kept(store)


def test_what_was_heard_of_before(client: Client, store: Store) -> None:
    """Who has waited for the failure, and waits again, does not take the old one for a new one."""
    task_id = client.submit([1])
    fail(store)
    with pytest.raises(TaskFailed):
        client.result(task_id, 60)
    told: Any = client._redis.get(keys.result(task_id))
    client._redis.publish(client._origin.channel, b"[%b]" % told)  # as if it came when nobody read any more
    client.retry(task_id)
    with pytest.raises(WaitTimeout):
        client.result(task_id, 0.05)
    (task,) = store.claim(1)
    store.settle([done(task)])
    assert client.result(task_id, 60) == 1


def test_bounds(broker: BrokerSettings) -> None:
    """The oldest go first; one that is larger than all may be is not kept at all."""
    store = store_of(broker, settings=QueueSettings(max_failed=3))
    with Client(Settings(broker=broker)) as client:
        sent = client.submit_many([[number] for number in range(5)])
        for _ in sent:
            fail(store)
        assert kept(store) == set(sent[2:])
        many = client.submit_many([[number] for number in range(300)])
        fail(store, 300)
        assert len(kept(store)) == 3
        assert kept(store) <= set(many)
        small = store_of(broker, settings=QueueSettings(max_failed_bytes=200_000))
        images = [client.submit(IMAGE) for _ in range(2)]
        for _ in images:
            fail(small)
        assert kept(store) == {images[1]}
        large = client.submit(np.zeros((3, 200, 200), np.float32))
        fail(small)
        assert kept(store) == {images[1]}
        with pytest.raises(WrongState, match=r"its inputs are gone: submit it again.*queue\.max_failed"):
            client.retry(large)
        store.client.zadd(keys.FAILED_AGES, {images[1]: 5})
        task_id = client.submit([1])
        fail(small)
        assert kept(store) == {task_id}
        store.client.zadd(keys.FAILED_AGES, {task_id: 5})
        assert bind(store.client, "trim")(args=[10, 10**9, 60, 1]) == [task_id.encode()]
        assert kept(store) == set()


def test_a_body_that_somebody_has_deleted(client: Client, store: Store) -> None:
    """It is not sent again without it."""
    task_id = client.submit(IMAGE)
    fail(store)
    store.client.unlink(keys.body(task_id))
    with pytest.raises(InputError, match="its inputs are gone; submit it again"):
        client.retry(task_id)
    assert client.status(task_id).state == "failed"


def test_none_is_kept(broker: BrokerSettings, client: Client) -> None:
    """Where the bound is 0, and of what nobody wants to hear of."""
    store = store_of(broker, settings=QueueSettings(max_failed=0))
    task_id = client.submit(IMAGE)
    fail(store)
    assert kept(store) == set()
    with pytest.raises(WrongState):
        client.retry(task_id)
    store = store_of(broker)
    client.submit(IMAGE, ignore_result=True)
    (task,) = store.claim(1)
    store.settle([failed(task)._replace(keep=False)])
    assert kept(store) == set()


def test_what_did_not_fail(client: Client, store: Store) -> None:
    """A task that completed, or was cancelled, is not sent again."""
    first, second, third = client.submit_many([[1]] * 3)
    tasks = store.claim(3)
    client.cancel(second)
    store.settle([done(tasks[0]), failed(tasks[1]), failed(tasks[2])])
    store.settle([failed(task) for task in tasks])  # an answer was lost
    assert kept(store) == {third}
    for task_id, state in ((first, "completed"), (second, "cancelled")):
        with pytest.raises(WrongState, match=f"is {state}: only a failed task"):
            client.retry(task_id)


def test_whose_it_is(client: Client, store: Store) -> None:
    """Its caller's, also when its result has expired; who deletes it deletes its inputs."""
    task = submissions.build(IMAGE, many=False, default_model="digits", caller="alice")
    call = calls.one(task, QueueSettings())
    for command in call.commands():
        store.client.execute_command(*command)  # type: ignore[no-untyped-call]
    bind(store.client, "submit")(keys=list(call.bodies), args=call.args)
    fail(store)
    for _ in range(2):
        for verb in (client.retry, client.forget):
            with pytest.raises(TaskNotFound):
                verb(task.id, only="bob")
        store.client.unlink(keys.result(task.id))
    client.retry(task.id, only="alice")
    assert client.status(task.id, only="alice").state == "queued"
    fail(store)
    store.client.unlink(keys.result(task.id))
    client.forget(task.id, only="alice")
    assert kept(store) == set()


def test_an_id_that_comes_again(client: Client, store: Store) -> None:
    """What is kept for an id is not taken for another request's inputs, when all else of it has gone."""

    def put(value: float) -> bytes:
        task = submissions.build(IMAGE + value, many=False, default_model="digits", task_id="job")
        call = calls.one(task, QueueSettings())
        for command in call.commands():
            store.client.execute_command(*command)  # type: ignore[no-untyped-call]
        return bytes(bind(store.client, "submit")(keys=list(call.bodies), args=call.args))

    assert put(1) == b"job"
    fail(store)
    store.client.unlink(keys.result("job"), keys.KEYED)
    with pytest.raises(Exception, match="IDEMPOTENCY_CONFLICT"):
        put(2)
    assert kept(store) == {"job"}
    client.forget("job")
    assert put(2) == b"job"
