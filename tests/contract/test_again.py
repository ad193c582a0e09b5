# SPDX-License-Identifier: Apache-2.0
"""What waits again shows what it has shown before: model, queue, caller, place, and what is its own."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.client import calls, submissions
from gpuinfer.errors import DeadLettered
from gpuinfer.queue import results
from gpuinfer.queue.claims import Claimed, Final, Follow
from gpuinfer.queue.message import decode
from gpuinfer.queue.resource import to_resource
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import BrokerSettings, QueueSettings
from gpuinfer.worker.about import about
from tests.contract.conftest import on, send, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OWN: dict[str, Any] = {"priority": 7, "expires_s": 1e6, "metadata": {"a": "b"}, "traceparent": TRACE}


def submit(store: Store, caller: str = "alice", **options: Any) -> str:
    task = submissions.build([1], many=False, default_model="digits", caller=caller, **options)
    bind(store.client, "submit")(args=calls.one(task, QueueSettings()).args)
    return task.id


def shown(client: Client, task_id: str) -> dict[str, Any]:
    """Return a task as it is shown, without what changes with each look."""
    status = client.status(task_id)
    body = to_resource(status, client.place(status))
    assert status.caller == "alice"
    return {name: value for name, value in body.items() if name != "estimated_start_at"}


def start(store: Store, task: Claimed) -> None:
    envelope = decode(task.payload)
    tells, times = about(task, envelope, {}), {"sent_at": envelope.sent_at, "began_at": 1.5}
    meta = results.started(envelope.id, "w", 1, times=times, about=tells, caller="alice")
    store.begin([(task.seq, envelope.id, meta)])


@pytest.fixture
def both(broker: BrokerSettings) -> Store:
    return store_of(broker, models=("digits", "ant"))


@pytest.mark.parametrize("model", ["digits", "ant"])
def test_put_back(client: Client, both: Store, model: str) -> None:
    """A dead worker's tasks: they stand first again, in their order, and the attempt counts."""
    first = submit(both, model=model, **OWN)
    before = shown(client, first)
    assert (before["model"], before["queue"], before["priority"]) == (model, "realtime", 7)
    second = submit(both, model=model, priority=7)
    waits = submit(both, model=model, priority=7)
    tasks = [task for _ in range(2) for task in both.claim(1)]
    for task in tasks:
        start(both, task)
    assert shown(client, first)["status"] == "running"
    both.restore()
    assert shown(client, first) == before | {"attempt": 2}
    found = shown(client, second)
    assert (found["position"], found["priority"], found["metadata"]) == (2, 7, {})
    assert shown(client, waits)["position"] == 3
    while both.claim(1):
        pass
    assert shown(client, first)["position"] == 0


def test_sent_again(client: Client, store: Store) -> None:
    """A dead letter: at the end of its list, as if newly submitted."""
    task_id = submit(store, **OWN)
    before = shown(client, task_id)
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, DeadLettered("no"), deaths=2)
    for _ in range(2):
        submit(store, priority=7)
    client.retry(task_id)
    assert shown(client, task_id) == before | {"position": 3}


def test_sent_on(client: Client, both: Store) -> None:
    """The next task of a chain, in its caller's list."""
    head = submit(both)
    send(both, 2, model="ant", caller="alice")
    (task,) = both.claim(1)
    message = Submission(task="gpuinfer.predict", inputs=[1], queue="realtime", id="next").encode()
    follow = Follow(True, "realtime@alice", message, "next", ours=True, model="ant")
    meta = results.success(head, 1, worker="w", caller="alice")
    both.settle([Final(task.seq, head, meta, label="completed realtime digits", follows=(follow,))])
    found = shown(client, "next")
    assert (found["model"], found["queue"], found["position"]) == ("ant", "realtime", 3)
    assert client._redis.llen("realtime.ant@alice") == 3
