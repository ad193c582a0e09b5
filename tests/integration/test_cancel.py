# SPDX-License-Identifier: Apache-2.0
"""Cancelling what runs: its state says so at once, nothing more of it begins, what comes of it is dropped."""

from __future__ import annotations

import json

import pytest

from gpuinfer import Client
from gpuinfer.errors import TaskRevoked
from gpuinfer.queue import keys
from tests.integration.test_worker import plain_celery
from tests.models_for_tests import Gate, latched
from tests.services import Process, RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


def batches(worker: Process, action: str, task_id: str) -> int:
    """Count the lines of an action that name a task."""
    lines = [line for line in worker.lines() if f'"{action}"' in line]
    return sum(task_id in json.loads(line).get("task_ids", ()) for line in lines)


def test_what_runs_is_cancelled(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """A job between its slices, and a task whose only batch is on the device; its neighbour ends well."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=2)
    worker = workers.start(worker_models="slow", log_level="debug")
    job = client.submit_batch([[1.0]] * 200, model="slow")
    worker.wait_for_line('"batch_running"')
    assert client.cancel(job)
    begun = batches(worker, "batch_begun", job)
    assert client.status(job).state == "revoked"
    worker.wait_for_line(f'"task_cancelled".*{job}', 60)
    latch.open()
    worker.wait_for_line(f'"batch_done".*{job}', 60)
    wait_until(lambda: not redis_server.client().exists(keys.inflight(NAME)))
    latch.close()
    one, other = client.submit_many([[1.0], [2.0]], model="slow")
    wait_until(lambda: client.status(one).state == "running", 60)
    assert batches(worker, "batch_begun", job) <= begun + 1  # one that began at the same moment
    assert client.cancel(one)
    with pytest.raises(TaskRevoked, match="it was cancelled"):
        client.result(one, timeout_s=0)
    latch.open()
    assert client.result(other, timeout_s=60)["outputs"]["twice"] == [4.0]
    worker.wait_for_line(f'"batch_done".*{other}', 60)
    assert {client.status(task).state for task in (job, one)} == {"revoked"}
    assert not client.cancel(other)
    assert not redis_server.client().exists(keys.inflight(NAME))
    assert not any(word in worker.text() for word in ("Traceback", '"batch_unfinished"'))


def test_a_revoke_leaves_a_job_that_runs(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Without terminate it goes on after the slice that is on the device, to its end."""
    gate = Gate(workers.folder / "models" / "gate", max_batch_size=1, shut=True)
    workers.start(worker_models="gate")
    job = client.submit_batch([[float(n)] for n in range(1, 9)], model="gate")
    wait_until(lambda: client.status(job).state == "running")
    with plain_celery(redis_server) as stranger:
        (answer,) = stranger.control.revoke(job, destination=[NAME], reply=True, timeout=60.0, limit=1)
        inspected = stranger.control.inspect([NAME], timeout=60.0).revoked()
    gate.open()
    assert len(client.result(job, timeout_s=60)) == 8
    assert len(gate.batches) == 8
    assert f"{job} not revoked" in answer[NAME]["ok"]
    assert inspected == {NAME: []}
