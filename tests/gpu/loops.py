# SPDX-License-Identifier: Apache-2.0
"""What a batch costs without a queue: the bare loop, and each step of a worker's batch by itself.

    decode (request to arrays) ─► copy (to the device) ─► run ─► back (to arrays) ─► render (to the result)

After each step the device is waited for, so that its time is that step's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from gpuinfer.models.outputs import render_batch
from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.tensors import Array, Item, decode_batch
from tests.gpu.dry import dry_run

#: The device as torch has it; in a dry run there is the CPU alone.
DEVICE = "cpu" if dry_run() else "cuda:0"
WARM_UP_RUNS = 10
STEPS = ("decode", "copy", "run", "back", "render")


def wait() -> None:
    """Wait until the device has done all that it was given."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()


class Loop:
    """A network on the device, called as torch's documentation says, without anything of ours around it."""

    def __init__(self, folder: ModelFolder) -> None:
        if dry_run():
            torch.set_num_threads(1)  # as the worker's setting in the tests
        self.manifest = folder.manifest
        self._module: Any = torch.jit.load(folder.artefact, map_location=DEVICE)  # type: ignore[no-untyped-call]
        self._module.eval()

    def rate(self, values: Sequence[Any], seconds: float) -> float:
        """Return the items a second of copying a batch to the device, running it and copying it back."""
        batch = np.stack(self._arrays(values))
        with torch.inference_mode():
            for _ in range(WARM_UP_RUNS):
                self._once(batch)
            begun, runs = time.perf_counter(), 0
            while (took := time.perf_counter() - begun) < seconds:
                self._once(batch)
                runs += 1
        return runs * len(values) / took

    def _once(self, batch: Array) -> Array:
        found: Array = self._module(torch.from_numpy(batch).to(DEVICE)).cpu().numpy()
        return found

    def steps(self, values: Sequence[Any], runs: int) -> dict[str, float]:
        """Return the median milliseconds of each step of one batch."""
        took: dict[str, list[float]] = {step: [] for step in STEPS}
        with torch.inference_mode():
            for number in range(WARM_UP_RUNS + runs):
                for step, seconds in self._steps_once(values).items():
                    if number >= WARM_UP_RUNS:
                        took[step].append(1000 * seconds)
        return {step: median(found) for step, found in took.items()}

    def _steps_once(self, values: Sequence[Any]) -> dict[str, float]:
        took: dict[str, float] = {}

        def timed(step: str, call: Callable[[], Any]) -> Any:
            wait()
            begun = time.perf_counter()
            result = call()
            wait()
            took[step] = time.perf_counter() - begun
            return result

        arrays = timed("decode", lambda: self._arrays(values))
        tensor = timed("copy", lambda: torch.from_numpy(np.stack(arrays)).to(DEVICE))
        output = timed("run", lambda: self._module(tensor))
        array = timed("back", lambda: output.cpu().numpy())
        timed("render", lambda: render_batch(self.manifest, [(row,) for row in array]))
        return took

    def _arrays(self, values: Sequence[Any]) -> list[Array]:
        items: list[Any] = decode_batch(self.manifest, values)
        good: list[Item] = []
        for item in items:
            if isinstance(item, Exception):
                raise item
            good.append(item)
        return [item[0] for item in good]
