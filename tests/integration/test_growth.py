# SPDX-License-Identifier: Apache-2.0
"""A worker whose model leaks: it ends between two batches, and its successor goes on."""

from __future__ import annotations

import json

import pytest

from gpuinfer import Client
from gpuinfer.worker.ceiling import EX_GROWN
from tests.models_for_tests import leaker
from tests.workers import NAME, Workers

pytestmark = pytest.mark.integration


def test_a_worker_that_grows_past_its_limit_is_done_after_its_batch(workers: Workers, client: Client) -> None:
    """It says so and hands back what it has not begun; all get their results."""
    leaker(workers.folder / "models" / "leaker", 400)
    first = workers.start(worker_models="leaker", worker_max_memory_mb=900, worker_device="cpu")
    ids = client.submit_many([[float(n)] for n in range(1, 5)], model="leaker")
    assert first.wait(60) == EX_GROWN
    (said,) = [json.loads(line) for line in first.lines() if '"memory_limit"' in line]
    assert said["worker"] == NAME
    assert said["held_mb"] > said["max_memory_mb"] == 900
    done = [client.status(task_id).state for task_id in ids]
    assert done.count("completed") >= 1
    assert done == sorted(done), "what was not begun waits in its order"
    workers.start(worker_models="leaker", worker_device="cpu")
    found = [result["outputs"]["twice"] for result in client.results(ids, timeout_s=60)]
    assert found == [[2.0 * n] for n in range(1, 5)]


def test_a_limit_below_what_the_models_take_is_refused(workers: Workers) -> None:
    """Exit 78, which no unit tries again, with the key's name."""
    leaker(workers.folder / "models" / "leaker", 1)
    worker = workers.start(ready=False, worker_models="leaker", worker_max_memory_mb=20, worker_device="cpu")
    assert worker.wait(60) == 78
    assert "worker.max_memory_mb" in worker.text()
