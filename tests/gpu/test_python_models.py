# SPDX-License-Identifier: Apache-2.0
"""A Python model on the GPU: prepared beside it, run on it, halved on it, and finished behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuinfer import Client
from gpuinfer.errors import InferenceError
from tests.models_for_tests import python_model
from tests.workers import Workers

pytestmark = pytest.mark.gpu

_CODE = """
    import torch


    class Squares:
        example = [0.0, 0.0]

        def load(self, ctx):
            self.device = ctx.device
            self.factor = torch.full((1,), 2.0, device=ctx.device)

        def prepare(self, item: list):
            host = torch.tensor(item)
            return host.pin_memory() if self.device.startswith("cuda") else host

        def predict(self, batch):
            columns = torch.stack([item.to(self.device, non_blocking=True) for item in batch])
            if bool((columns < 0).any()):
                raise ValueError("negative")
            return [(row, str(row.device)) for row in columns**2 * self.factor]

        def finish(self, out):
            row, device = out
            return {"row": row, "device": device}
"""


def test_prepared_run_and_finished(workers: Workers, client: Client, tmp_path: Path) -> None:
    """Several batches in a row: each answer is its own input's, from the device the result names."""
    python_model(tmp_path / "models" / "squares", _CODE, "max_batch_size = 8\n")
    workers.start(0, worker_models="squares")
    values = [[float(number), number / 2] for number in range(100)]
    values[50] = [-1.0, 0.0]
    answers = client.results(client.submit_many(values, model="squares"), timeout_s=60, return_errors=True)
    culprit = answers.pop(50)
    assert isinstance(culprit, InferenceError)
    assert "ValueError: negative (model.py" in str(culprit)
    del values[50]
    assert {answer["device"] for answer in answers} == {"cuda:0"}
    for (first, second), answer in zip(values, answers, strict=True):
        assert answer["output"]["row"] == [2 * first**2, 2 * second**2]
