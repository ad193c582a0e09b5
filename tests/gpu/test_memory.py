# SPDX-License-Identifier: Apache-2.0
"""The GPU's memory: too little for a batch, and too little because another process has it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpuinfer import Client
from gpuinfer.errors import DeviceOutOfMemory
from gpuinfer.gpus import Gpu
from tests.gpu.conftest import entries, findings
from tests.gpu.models import FITS, hungry, large
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.gpu

#: Less than a process needs to use the GPU at all.
LEFT_BYTES = 200 * 1024**2


def test_a_batch_that_does_not_fit_is_halved(
    workers: Workers, client: Client, tmp_path: Path, gpu: Gpu
) -> None:
    """CUDA runs out of memory: the batch is halved, every task has its result, the size is remembered."""
    hungry(tmp_path / "models" / "hungry", gpu.memory_bytes)
    large(tmp_path / "models" / "large", gpu.memory_bytes)
    values = [float(number) for number in range(1, 2 * FITS + 1)]
    first = client.submit_many([[value] for value in values], model="hungry")
    worker = workers.start(0, worker_models="hungry,large")
    results = client.results(first, timeout_s=60)
    assert [result["outputs"]["twice"] for result in results] == [[2 * value] for value in values]
    loaded = {entry["model"]: entry["max_batch_size"] for entry in entries(worker, "model_loaded")}
    assert loaded == {"hungry": 2 * FITS, "large": FITS}, (
        "the warm-up finds what fits where zeros take as much"
    )
    (reduced,) = entries(worker, "batch_size_reduced")
    assert (reduced["model"], reduced["max_batch_size"]) == ("hungry", FITS)
    second = client.submit_many([[value] for value in values], model="hungry")
    client.results(second, timeout_s=60)

    def batches() -> list[int]:
        return [e["batch_size"] for e in entries(worker, "batch_done") if set(e["task_ids"]) <= set(second)]

    wait_until(lambda: sum(batches()) == len(second), timeout=30)  # the log follows the results
    assert max(batches()) <= FITS


def test_memory_of_another_process_is_told_apart(workers: Workers) -> None:
    """Another process holds the memory: the worker says out of memory, the doctor names the process."""
    holder = workers.spawn(sys.executable, "-m", "tests.gpu.holder", str(LEFT_BYTES), name="holder")
    holder.wait_for_line("holding", timeout=60)
    worker = workers.start(0, ready=False)
    assert worker.wait(60) == DeviceOutOfMemory.exit_code
    (failed,) = entries(worker, "start_failed")
    assert failed["code"] == DeviceOutOfMemory.code
    (finding,) = findings("gpu.memory")
    assert finding["status"] == "warning", finding
    assert str(holder.pid) in finding["message"].partition("used by processes ")[2].split(", ")
