# SPDX-License-Identifier: Apache-2.0
"""Models of half the width, from the request to the result."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from gpuinfer import Client
from tests.gpu.models import linear
from tests.workers import Workers

pytestmark = pytest.mark.gpu

#: Name of the model and of the dtype -> the largest difference from the same sum in double precision.
#: Both round inputs, weights and sums: bfloat16 to 8 bits, float16 to 11.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.01}


def test_bfloat16_and_float16(workers: Workers, client: Client, tmp_path: Path) -> None:
    """Models in bfloat16 and float16 answer on the GPU as the same sums in double precision do."""
    numbers = random.Random(3)  # noqa: S311  no secret
    inputs = [[round(numbers.uniform(-1, 1), 3) for _ in range(64)] for _ in range(24)]
    models = {name: linear(tmp_path / "models" / name, getattr(torch, name)) for name in TOLERANCE}
    workers.start(0, worker_models=",".join(models))
    for name, model in models.items():
        with torch.inference_mode():
            wanted = model.double()(torch.tensor(inputs, dtype=torch.float64))
        results = client.results(client.submit_many(inputs, model=name), timeout_s=60)
        assert {result["device"] for result in results} == {"cuda:0"}
        found = torch.tensor([result["outputs"]["y"] for result in results], dtype=torch.float64)
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max()) < TOLERANCE[name], name
        assert float(found.abs().max()) > 0.1, "it is not all zeros"
