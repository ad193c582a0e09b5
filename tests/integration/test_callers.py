# SPDX-License-Identifier: Apache-2.0
"""Callers on a real worker: they share it by weight, whatever each has waiting; their tasks stay theirs."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.client import calls, submissions
from gpuinfer.errors import InputError, TaskNotFound
from gpuinfer.queue import keys
from gpuinfer.queue.purge import set_paused
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QueueSettings
from tests.models_for_tests import perceptron
from tests.services import RedisServer
from tests.workers import Workers

pytestmark = pytest.mark.integration

INPUT = [0.5] * 64


def submit(client: Client, caller: str, count: int, value: Any = INPUT) -> list[str]:
    """Submit tasks of a caller, as a front does."""
    tasks = [submissions.build(value, many=False, model="net", caller=caller) for _ in range(count)]
    script = bind(client._redis, "submit")
    for call in calls.bulk(tasks, QueueSettings()):
        script(args=call.args)
    return [task.id for task in tasks]


def test_callers_of_one_worker(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """One has ten times as much waiting: until the other has nothing left, each is served by its weight."""
    perceptron(workers.folder / "models" / "net", max_batch_size=32)
    raw: Any = redis_server.client()
    set_paused(raw, "realtime", True)
    workers.start(worker_models="net")
    for weight, share in ((1, 0.5), (3, 0.75)):
        raw.hset(keys.WEIGHTS, "bob", weight)
        raw.delete(keys.HISTORY)
        set_paused(raw, "realtime", True)
        ids = submit(client, "alice", 4000) + submit(client, "bob", 400)
        set_paused(raw, "realtime", False)
        client.results(ids, timeout_s=120)
        entries = [entry.decode().split("\n") for entry in raw.lrange(keys.HISTORY, 0, -1)]
        callers = [lines[3] for lines in reversed(entries)]
        assert (callers.count("alice"), callers.count("bob")) == (4000, 400)
        until = 4400 - callers[::-1].index("bob")
        assert callers[:until].count("bob") / until == pytest.approx(share, abs=0.05)
    # A task that failed is sent again by its caller, with its inputs: it fails again, as it did before.
    (bad,) = submit(client, "alice", 1, value=["no number"])
    for _ in range(2):
        with pytest.raises(InputError, match="has shape"):
            client.result(bad, timeout_s=60)
        with pytest.raises(TaskNotFound):
            client.retry(bad, only="bob")
        client.retry(bad, only="alice")
    with pytest.raises(InputError):
        client.result(bad, timeout_s=60)
    failed = client.tasks(status="failed", only="alice").tasks
    assert [(one.id, one.caller) for one in failed] == [(bad, "alice")] * 3
