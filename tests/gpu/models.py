# SPDX-License-Identifier: Apache-2.0
"""Models that do to a GPU what the tests are about. In a dry run they pretend it: on the CPU nothing happens.

Zeros, as in a warm-up, are harmless to all but ``large``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.gpu.dry import dry_run
from tests.models_for_tests import write_model

#: A batch of this size fits the GPU, and one of twice this size does not.
FITS = 8
_ONE_NUMBER = """
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "twice"
"""


class _Hungry(nn.Module):
    """Takes a tenth of the GPU's memory for each item with a positive value."""

    def __init__(self, each_bytes: int, *, always: bool) -> None:
        super().__init__()
        self.each_bytes = each_bytes
        self.always = always
        self.fits = FITS if dry_run() else 1_000_000

    def forward(self, x: Tensor) -> Tensor:
        if self.always or bool((x > 0).any()):
            if x.size(0) > self.fits:
                raise RuntimeError("CUDA out of memory. Tried to allocate what a stub does not have")
            taken = torch.empty([x.size(0), self.each_bytes], dtype=torch.uint8, device=x.device)
            return x * 2 + taken[:, :1].to(x.dtype) * 0  # used, or it would be optimised away
        return x * 2


def _hungry(folder: Path, memory_bytes: int, *, always: bool) -> Path:
    each = 1 if dry_run() else memory_bytes // 10
    return write_model(folder, _Hungry(each, always=always), f"max_batch_size = {2 * FITS}\n{_ONE_NUMBER}")


def hungry(folder: Path, memory_bytes: int) -> Path:
    """One float to its double; a batch of ``2 * FITS`` fits in its warm-up, and not with positive values."""
    return _hungry(folder, memory_bytes, always=False)


def large(folder: Path, memory_bytes: int) -> Path:
    """As ``hungry``, and zeros take as much: the warm-up finds out."""
    return _hungry(folder, memory_bytes, always=True)


class _Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(10, 1), requires_grad=False)
        self.dry = dry_run()

    def forward(self, x: Tensor) -> Tensor:
        place = (x[:, 0] * 1_000_000).to(torch.int64)
        if self.dry and bool((x > 0).any()):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return x * 2 + self.table[place]


def asserting(folder: Path) -> Path:
    """One float to its double; a positive one makes a kernel assert on the device, which ends the context."""
    return write_model(folder, _Asserting(), f"max_batch_size = 8\n{_ONE_NUMBER}")


class Linear(nn.Module):
    """A layer whose weights, input and output have one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 16).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def linear(folder: Path, dtype: torch.dtype) -> Linear:
    """64 numbers to 16 in a dtype of half the width; returns the module, the same in every run."""
    torch.manual_seed(2)
    model, name = Linear(dtype), str(dtype).removeprefix("torch.")
    tables = f"""
[[inputs]]
name = "x"
dtype = "{name}"
shape = [64]
[[outputs]]
name = "y"
dtype = "{name}"
shape = [16]
"""
    write_model(folder, model, tables)
    return model
