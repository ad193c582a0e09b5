# SPDX-License-Identifier: Apache-2.0
"""A task is its caller's through all its states: nobody else's verbs find it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuinfer import Client
from gpuinfer.client import calls, submissions
from gpuinfer.client.aio import AsyncClient
from gpuinfer.errors import DeadLettered, TaskFailed, TaskNotFound, WrongState
from gpuinfer.queue import dead, keys, results
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.message import decode
from gpuinfer.queue.purge import lines, purge
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import BrokerSettings, QueueSettings, Settings
from tests.contract.conftest import ids, message, on, send

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

#: What a careless or hostile caller may write: it must not be taken for whose task it is.
MIMIC = {"caller": "bob", '{"status":"SUCCESS","caller":"bob"': '","caller":"bob"'}


def submit(store: Store, caller: str, inputs: Any = 1, **options: Any) -> str:
    """Submit a task of a caller as a front does; return the id that holds."""
    task = submissions.build(inputs, many=False, default_model="digits", caller=caller, **options)
    call = calls.one(task, QueueSettings())
    for command in call.commands():
        store.client.execute_command(*command)  # type: ignore[no-untyped-call]
    return calls.accepted(bind(store.client, "submit")(keys=list(call.bodies), args=call.args)).id


def ends(store: Store, task: Claimed, write: Callable[..., bytes], what: Any) -> None:
    """End a task as a worker does."""
    task_id, place = decode(task.payload).id, keys.place_of(task.list_key)
    meta = write(task_id, what, worker="w", caller=place.caller, about={"metadata": MIMIC})
    store.settle([Final(task.seq, task_id, meta, label="completed realtime digits")])


def foreign(client: Client, task_id: str, who: str = "bob") -> None:
    """Nobody but its caller finds it, by any verb; and nothing has happened to it."""
    before = client._redis.dump(keys.result(task_id))
    with pytest.raises(TaskNotFound) as unknown:
        client.status("00000000-0000-4000-8000-000000000000", only=who)
    said = str(unknown.value).replace("00000000-0000-4000-8000-000000000000", task_id)
    for verb in (client.status, client.wait, client.cancel, client.retry, client.forget):
        with pytest.raises(TaskNotFound) as caught:
            verb(task_id, only=who)
        assert str(caught.value) == said
    assert client._redis.dump(keys.result(task_id)) == before


def test_through_all_states(client: Client, store: Store) -> None:
    """Waiting, running, put back, completed: it is alice's."""
    task_id = submit(store, "alice", metadata=MIMIC)
    assert client.status(task_id, only="alice").caller == "alice"
    foreign(client, task_id)
    with pytest.raises(TaskNotFound):  # as late as for an unknown id
        client.wait(task_id, 0.05, only="bob")
    (task,) = store.claim(1)
    started = results.started(task_id, "w", 1, about={"metadata": MIMIC}, caller="alice")
    store.begin([(task.seq, task_id, started)])
    assert client.status(task_id).state == "running"
    foreign(client, task_id)
    store.restore()
    assert client.status(task_id, only="alice").state == "queued"
    foreign(client, task_id)
    (task,) = store.claim(1)
    ends(store, task, results.success, {"status": "SUCCESS", "caller": "bob"})
    foreign(client, task_id)
    assert client.status(task_id, only="alice").result == {"status": "SUCCESS", "caller": "bob"}
    client.forget(task_id, only="alice")


def test_who_may_cancel(client: Client, store: Store) -> None:
    """Its caller; and it is still his when it is cancelled. Purged ones are, too."""
    first, second = submit(store, "alice", metadata=MIMIC), submit(store, "alice")
    foreign(client, first)
    assert client.cancel(first, only="alice")
    assert client.cancel(first, only="alice") is False
    purge(store.client, lines(store.client), QueueSettings())
    for task_id in (first, second):
        assert client.status(task_id, only="alice").state == "revoked"
        foreign(client, task_id)


def test_dead_letters(client: Client, store: Store) -> None:
    """One's own is sent again, and another's is not; when its result has expired, too."""
    task_id = submit(store, "alice", priority=9)
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"), deaths=2)
    assert client.status(task_id, only="alice").state == "failed"
    foreign(client, task_id)
    store.client.unlink(keys.result(task_id))
    foreign(client, task_id)
    client.retry(task_id, only="alice")
    assert client.status(task_id, only="alice").state == "queued"
    foreign(client, task_id)
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"), deaths=2)
    store.client.unlink(keys.result(task_id))
    client.forget(task_id, only="alice")
    assert dead.ids(store.client) == []


def test_what_is_nobodys(client: Client, store: Store) -> None:
    """A plain producer's task is seen by all; who is somebody does nothing to it, who is nobody may."""
    plain = message()
    store.client.lpush("realtime", plain)
    task_id = decode(plain).id
    with pytest.raises(TaskNotFound):
        client.cancel(task_id, only="alice")
    assert store.client.exists(keys.result(task_id)) == 0
    (task,) = store.claim(1, search=True)
    ends(store, task, results.failure, TaskFailed("no"))
    assert client.status(task_id, only="alice").state == "failed"
    with pytest.raises(TaskNotFound):
        client.forget(task_id, only="alice")
    with pytest.raises(WrongState):
        client.retry(task_id, only="alice")
    client.forget(task_id, only="")


def test_lists_show_ones_own(client: Client, store: Store) -> None:
    """And what is nobody's; of those that failed, and were cancelled, too."""
    by = {caller: send(store, 3, caller=caller) for caller in ("alice", "bob", "")}
    for task in store.claim(6):
        number = sum(map(ord, task.payload.decode())) % 2
        ends(store, task, *((results.success, 1) if number else (results.failure, TaskFailed("no"))))
    for task_ids in by.values():
        for task_id in task_ids:
            client.cancel(task_id)
    for who in ("alice", "bob"):
        found = {task.id for task in client.tasks(only=who).tasks}
        assert found == {*by[who], *by[""]}
    assert {task.id for task in client.tasks(only="").tasks} == set(by[""])
    assert len(client.tasks().tasks) == 9
    assert {task.caller for task in client.tasks().tasks} == {"alice", "bob", ""}


async def test_waits(broker: BrokerSettings, store: Store) -> None:
    """Who waits for another's task hears nothing of it, for as long as it does for an unknown id."""
    task_id = submit(store, "alice")
    async with AsyncClient(Settings(broker=broker)) as client:
        waits = [asyncio.ensure_future(client.wait(task_id, 60, only=who)) for who in ("alice", "bob", None)]
        with pytest.raises(TaskNotFound):
            await client.wait(task_id, 0.05, only="bob")
        with pytest.raises(TaskNotFound):
            await client.wait(task_id, only="bob")
        (task,) = await asyncio.to_thread(store.claim, 1)
        await asyncio.to_thread(ends, store, task, results.success, 1)
        assert (await waits[0]).result == (await waits[2]).result == 1
        await asyncio.sleep(0)
        assert not waits[1].done()
        waits[1].cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for verb in (client.status, client.cancel, client.retry, client.forget):
            with pytest.raises(TaskNotFound):
                await verb(task_id, only="bob")
        assert [task.id for task in (await client.tasks(only="bob")).tasks] == []
        await client.forget(task_id, only="alice")


def test_an_id_of_ones_own(client: Client, store: Store) -> None:
    """Another caller's id is refused whatever became of it; its large inputs are left alone."""
    image = np.zeros((3, 100, 100), np.float32)

    def refused() -> None:
        for caller in ("bob", ""):
            with pytest.raises(Exception, match="IDEMPOTENCY_CONFLICT"):
                submit(store, caller, image, task_id="job-1")

    assert submit(store, "alice", image, task_id="job-1") == "job-1"
    refused()
    assert submit(store, "alice", image, task_id="job-1") == "job-1"
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"), deaths=2)
    refused()
    client.retry("job-1", only="alice")
    refused()
    client.cancel("job-1")
    refused()
    assert client.status("job-1", only="alice").caller == "alice"
    store.claim(1)


def test_an_id_that_another_has_taken(client: Client, store: Store) -> None:
    """A dead letter whose id is another caller's by now is not sent again over that one's task."""
    submit(store, "alice", task_id="job-1")
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"), deaths=2)
    store.client.unlink(keys.result("job-1"), keys.KEYED)
    submit(store, "bob", task_id="job-1")
    for end in (False, True):
        before = store.client.dump(keys.result("job-1"))
        with pytest.raises(TaskNotFound):
            client.retry("job-1", only="alice")
        with pytest.raises(TaskNotFound):
            client.retry("job-1")
        assert store.client.dump(keys.result("job-1")) == before
        if not end:
            (task,) = store.claim(1)
            ends(store, task, results.failure, TaskFailed("no"))


def test_keys_of_a_callers_own(store: Store) -> None:
    """The same idempotency key of two callers stands for two requests; each finds its own again."""
    first = [submit(store, caller, 1, idempotency_key="k") for caller in ("alice", "bob", "")]
    assert len(set(first)) == 3
    assert [submit(store, caller, 1, idempotency_key="k") for caller in ("alice", "bob", "")] == first
    with pytest.raises(Exception, match="IDEMPOTENCY_CONFLICT"):
        submit(store, "bob", 2, idempotency_key="k")


def test_a_letter_and_a_plain_id_of_anybodys_make(client: Client, store: Store) -> None:
    """An id that mimics a letter's beginning gives nobody the letter."""
    odd = 'x","list":"realtime.digits@bob'
    payload = Submission(task="gpuinfer.predict", inputs=[1], queue="realtime", id=odd).encode()
    store.client.lpush("realtime.digits@alice", payload)
    store.client.zadd(keys.index("digits"), {"realtime.digits@alice": 9})
    (task,) = store.claim(1)
    assert ids([task]) == [odd]
    store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"), deaths=2)
    store.client.unlink(keys.result(odd))
    with pytest.raises(TaskNotFound):
        client.forget(odd, only="bob")
    with pytest.raises(TaskNotFound):
        client.retry(odd, only="bob")
