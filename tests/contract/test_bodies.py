# SPDX-License-Identifier: Apache-2.0
"""Large bodies lie beside the lists: as safe as the message until it has ended, and gone then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import redis

from gpuinfer import Client
from gpuinfer.client import calls, submissions
from gpuinfer.errors import DeadLettered, InputError, QueueFull, UnknownModel
from gpuinfer.queue import dead, keys
from gpuinfer.queue.claims import Final
from gpuinfer.queue.connection import explain
from gpuinfer.queue.message import decode
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import QueueSettings
from tests.contract.conftest import begin, done, ids, on

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-socket")]

IMAGE = np.arange(3 * 224 * 224, dtype=np.float32).reshape(3, 224, 224)


def left(store: Store) -> tuple[list[bytes], dict[bytes, bytes], int]:
    """Return the bodies in Redis, those on account, and their bytes."""
    found: list[bytes] = sorted(store.client.scan_iter(f"{keys.BODY_PREFIX}*"))
    account: dict[bytes, bytes] = store.client.hgetall(keys.BODIES)  # type: ignore[assignment]
    size: list[bytes] = store.client.hvals(keys.BODY_BYTES)  # type: ignore[assignment]
    return found, account, sum(map(int, size))


NOTHING: tuple[list[bytes], dict[bytes, bytes], int] = ([], {}, 0)


def test_no_script_sees_it(store: Store, client: Client) -> None:
    """The list holds some 600 bytes; the body is fetched by its id, the same as it was sent."""
    task_id = client.submit(IMAGE)
    (task,) = store.claim(1)
    assert len(task.payload) < 1000
    message = decode(task.payload)
    body = store.body(task_id)
    assert body is not None
    assert message.beside == len(body)
    assert np.array_equal(message.unpack(body, many=False), IMAGE)


def test_until_the_end(store: Store, client: Client) -> None:
    """It has no TTL while it waits, is in flight, is put back and comes again; it goes with the end."""
    task_id = client.submit(IMAGE, queue="batch")
    key = keys.body(task_id)

    def kept() -> bool:
        found, account, size = left(store)
        return (
            store.client.ttl(key) == -1
            and found == [key.encode()]
            and account == {task_id.encode(): b"batch %d" % size}
        )

    assert kept()
    (task,) = store.claim(1)
    assert kept()
    store.release([task.seq])
    (task,) = store.claim(1)
    begin(store, [task])
    store.restore()
    assert kept()
    (task,) = store.claim(1)
    assert kept()
    store.settle([done(task)])
    assert left(store) == NOTHING


def test_every_end_drops_it(store: Store, client: Client) -> None:
    """A result that is not kept, a cancellation, many at once."""
    tasks = client.submit_many(np.stack([IMAGE] * 12))
    assert all(client.cancel(task_id) for task_id in tasks[:3])
    claimed = store.claim(100)
    assert ids(claimed) == tasks
    store.settle([done(task) for task in claimed])
    client.submit(IMAGE, ignore_result=True)
    (task,) = store.claim(1)
    store.settle([Final(task.seq, ids([task])[0], b"{}", keep=False)])
    assert left(store) == NOTHING


def test_a_dead_letter_keeps_it(store: Store, client: Client) -> None:
    """It is not among what waits, and there when the letter is sent again; it goes with the letter."""
    task_id = client.submit(IMAGE)
    for again in (True, False):
        (task,) = store.claim(1)
        store.bury(task.seq, task.list_key, task.payload, DeadLettered("x"))
        assert left(store) == ([keys.body(task_id).encode()], {}, 0)
        if again:
            dead.retry(store.client, task_id)
            assert left(store)[1].keys() == {task_id.encode()}
    assert store.client.ttl(keys.body(task_id)) == -1
    assert dead.drop(store.client, [task_id, "another"]) == 1
    assert left(store) == NOTHING


def test_a_letter_that_cannot_be_sent_again_stays(store: Store, client: Client) -> None:
    """Something else stands under its list's name, or its body is gone: refused, and nothing is lost."""
    raw: Any = store.client
    task_id = client.submit(IMAGE)
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"))
    meta = raw.get(keys.result(task_id))
    raw.set("realtime", "a stranger's")
    with pytest.raises(InputError, match="'realtime' is not a list"):
        dead.retry(raw, task_id)
    raw.delete("realtime")
    body = raw.getdel(keys.body(task_id))
    with pytest.raises(InputError, match="its inputs are gone"):
        dead.retry(raw, task_id)
    assert dead.ids(raw) == [task_id]
    assert raw.get(keys.result(task_id)) == meta
    raw.set(keys.body(task_id), body)
    dead.retry(raw, task_id)
    assert ids(store.claim(1)) == [task_id]


def test_what_is_never_submitted_goes_by_itself(store: Store) -> None:
    """A client that dies between the body and the message leaves it for a minute."""
    call = calls.one(submissions.build(IMAGE, many=False), QueueSettings())
    (command,) = call.commands()
    store.client.execute_command(*command)  # type: ignore[no-untyped-call]
    (key,) = call.bodies
    assert 0 < store.client.ttl(key) <= keys.BODY_VOID_S
    assert left(store)[1:] == ({}, 0)


def test_what_is_refused_leaves_nothing(store: Store, client: Client) -> None:
    """An unknown model; a second task under one key; a body that Redis has dropped meanwhile."""
    with pytest.raises(UnknownModel):
        client.submit(IMAGE, model="nobody")
    assert left(store) == NOTHING
    first = client.submit(IMAGE, idempotency_key="k")
    assert client.submit(IMAGE, idempotency_key="k") == first
    assert left(store)[0] == [keys.body(first).encode()]
    call = calls.one(submissions.build(IMAGE, many=False), QueueSettings())
    with pytest.raises(redis.ResponseError) as caught:
        bind(store.client, "submit")(keys=list(call.bodies), args=call.args)
    assert isinstance(explain(caught.value), QueueFull)
    assert ids(store.claim(10)) == [first]


def test_a_repeated_call_changes_nothing(store: Store) -> None:
    """An answer was lost, and all is sent again: while it waits, while it runs, and when it has ended."""
    call = calls.one(submissions.build(IMAGE, many=False), QueueSettings())
    (key,) = call.bodies
    submit = bind(store.client, "submit")

    def send() -> None:
        for command in call.commands():
            store.client.execute_command(*command)  # type: ignore[no-untyped-call]
        submit(keys=list(call.bodies), args=call.args)

    send()
    send()
    (task,) = store.claim(10)
    begin(store, [task])
    before = left(store)
    send()
    assert store.client.ttl(key) == -1
    assert left(store) == before
    assert store.claim(10) == []
    store.settle([done(task)])
    send()
    assert store.claim(10) == []
    assert 0 < store.client.ttl(key) <= keys.BODY_VOID_S
    assert left(store)[1:] == ({}, 0)
