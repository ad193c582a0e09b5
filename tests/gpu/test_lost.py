# SPDX-License-Identifier: Apache-2.0
"""A worker, or its context, is lost: what becomes of tasks and of memory. And two workers on one GPU."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from gpuinfer import Client
from gpuinfer.errors import DeadLettered, DeviceError
from gpuinfer.gpu_binding import VISIBLE
from gpuinfer.gpus import Gpu, list_gpus
from tests.gpu.conftest import entries
from tests.gpu.models import asserting
from tests.models_for_tests import sleeper
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.gpu

#: How a worker ends whose GPU fails under a batch (sysexits.h: EX_IOERR).
LOST = 74
#: What a process's end may leave on the GPU beside what was there before, as NVML rounds.
SLACK_BYTES = 64 * 1024**2


def used() -> int:
    """Return how many bytes of the first GPU are used."""
    return list_gpus().gpus[0].used_bytes


def used_at_rest() -> int:
    """Return how many are used once the processes of earlier tests are gone from it."""
    seen = [used()]
    while len(seen) < 3 or len(set(seen[-3:])) > 1:
        time.sleep(0.3)
        seen.append(used())
    return seen[-1]


def test_a_lost_context_ends_the_worker_and_charges_the_task(
    workers: Workers, client: Client, tmp_path: Path
) -> None:
    """A kernel asserts: the worker ends with 74, the task is dead after two such ends, its neighbour not."""
    asserting(tmp_path / "models" / "asserting")
    good, bad = client.submit_many([[0.0], [1.0]], model="asserting")
    for start in (1, 2):
        worker = workers.start(0, ready=False, worker_models="asserting")
        assert worker.wait(60) == LOST, worker.tail()
        (told,) = entries(worker, "worker_ends")
        assert (told["code"], told["device"]) == (DeviceError.code, "cuda:0"), f"start {start}"
        assert "device-side assert" in told["reason"]
    workers.start(0, worker_models="asserting")
    assert client.result(client.submit([0.0], model="asserting"), timeout_s=60)["outputs"] == {"twice": [0.0]}
    assert client.result(good, timeout_s=60)["outputs"] == {"twice": [0.0]}
    with pytest.raises(DeadLettered):
        client.result(bad, timeout_s=60)


def test_sigkill_in_mid_batch(workers: Workers, client: Client, tmp_path: Path) -> None:
    """SIGKILL in mid-batch: the GPU's memory is free again, and the next start loses no task."""
    sleeper(tmp_path / "models" / "slow", 1.0, max_batch_size=2)
    before = used_at_rest()
    worker = workers.start(0, worker_models="slow")
    tasks = client.submit_many([[float(number)] for number in range(1, 5)], model="slow")
    worker.wait_for_line('"batch_running"')
    assert used() > before
    worker.send(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    wait_until(lambda: used() <= before + SLACK_BYTES, timeout=30)
    workers.start(0, worker_models="slow")
    results = client.results(tasks, timeout_s=60)
    assert [result["outputs"]["twice"] for result in results] == [[2.0 * number] for number in range(1, 5)]


def test_two_workers_on_one_gpu(
    workers: Workers, client: Client, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, bound to one GPU by its UUID, share its work."""
    sleeper(tmp_path / "models" / "slow", 0.1, max_batch_size=1)
    monkeypatch.setenv(VISIBLE, gpu.uuid)
    pair = [workers.start(number, ready=False, worker_models="slow") for number in (0, 1)]
    for worker in pair:
        worker.wait_for_line('"worker_ready"', timeout=60)
    tasks = client.submit_many([[float(number)] for number in range(1, 17)], model="slow")
    ended = {status.id: status for status in client.as_completed(tasks, timeout_s=60)}
    assert [ended[task].unwrap()["outputs"]["twice"] for task in tasks] == [[2.0 * n] for n in range(1, 17)]
    assert len({ended[task].worker for task in tasks}) == 2
