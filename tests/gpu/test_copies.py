# SPDX-License-Identifier: Apache-2.0
"""Copies beside what the GPU computes: the contract, and a worker whose batches are staged ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpuinfer import Client
from gpuinfer.models.copies import Cuda, Surface
from tests.copies import CopiesContract
from tests.fake_cuda import FakeCuda
from tests.gpu.dry import dry_run
from tests.gpu.models import linear
from tests.workers import Workers

pytestmark = pytest.mark.gpu

#: Clock cycles that the GPU is kept busy for: a second at 2 GHz.
LONG_CYCLES = 2_000_000_000


@pytest.fixture
def surface() -> Surface:
    return FakeCuda() if dry_run() else Cuda("cuda:0")


class TestCuda(CopiesContract):
    """The contract on the GPU."""

    def compute(self, surface: Any, x: torch.Tensor) -> torch.Tensor:
        doubled: torch.Tensor = surface.compute(lambda x: x * 2, x) if dry_run() else x * 2
        return doubled

    def work(self, surface: Any) -> None:
        if dry_run():
            surface.work()
        else:
            torch.cuda._sleep(LONG_CYCLES)  # type: ignore[no-untyped-call]  # torch left it out

    def happened(self, surface: Any, event: Any) -> bool:
        return bool(surface.happened(event) if dry_run() else event.query())


def test_batches_that_are_staged_ahead(workers: Workers, client: Client, tmp_path: Path) -> None:
    """A backlog in small full batches: each answer is its own input's, as the same sums on the CPU are."""
    model = linear(tmp_path / "models" / "sums", torch.float32)
    inputs = [[float((row * column) % 7) / 7 for column in range(64)] for row in range(600)]
    with torch.inference_mode():
        wanted = model.double()(torch.tensor(inputs, dtype=torch.float64))
    ids = client.submit_many(inputs, model="sums")
    workers.start(0, worker_models="sums", worker_max_batch_size=8)
    results = client.results(ids, timeout_s=60)
    assert {result["device"] for result in results} == {"cuda:0"}
    found = torch.tensor([result["outputs"]["y"] for result in results], dtype=torch.float64)
    assert float((found - wanted).abs().max()) < 1e-3
