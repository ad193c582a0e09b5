# SPDX-License-Identifier: Apache-2.0
"""The models and inputs of the bench: the 64-256-10 perceptron, and one that takes 5 ms an item."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.models_for_tests import perceptron, write_model

#: What the slow model takes for each item of a batch.
STEADY_S_PER_ITEM = 0.005


class _Steady(nn.Module):
    """Spends its time in native code without the GIL, by the clock, as a device would."""

    def __init__(self, nanoseconds: int) -> None:
        super().__init__()
        self.nanoseconds = nanoseconds

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 0).any()):
            begin = torch.ops.prim.TimePoint()
            while torch.ops.prim.TimePoint() - begin < self.nanoseconds * x.size(0):
                x = x + 0.0
        return x * 2


def steady(folder: Path, max_batch_size: int) -> Path:
    """One float to its double; 5 ms an item. Zeros, as in a warm-up, take no time."""
    tables = f"""
max_batch_size = {max_batch_size}
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "twice"
"""
    return write_model(folder, _Steady(int(STEADY_S_PER_ITEM * 1e9)), tables)


class _Means(nn.Module):
    """Nothing but the mean of an image: what is measured is its way."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)).unsqueeze(1)


_IMAGES = """
max_batch_size = 32
[[inputs]]
name = "x"
shape = [3, 224, 224]
[[outputs]]
name = "mean"
"""


def write_models(folder: Path) -> None:
    """Write all models of the bench into ``folder``; the number is the largest batch."""
    perceptron(folder / "perceptron", max_batch_size=256)
    for size in (1, 32):
        steady(folder / f"steady{size}", max_batch_size=size)
    write_model(folder / "means", _Means(), _IMAGES)


def vectors(count: int) -> list[list[float]]:
    """Return inputs of 64 floats for the perceptron, the same in every run."""
    numbers = random.Random(1)  # noqa: S311  no secret
    return [[round(numbers.uniform(-1, 1), 6) for _ in range(64)] for _ in range(count)]


def scalars(count: int) -> list[list[float]]:
    """Return inputs for the slow model."""
    return [[1.0 + i] for i in range(count)]
