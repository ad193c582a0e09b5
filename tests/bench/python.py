# SPDX-License-Identifier: Apache-2.0
"""Python models: beside TorchScript, and how long a device waits for what prepares its inputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.bench.lines import Line, Sizes, Target, compare
from tests.bench.measures import backlog
from tests.bench.models import STEADY_S_PER_ITEM, scalars, vectors
from tests.bench.stacks import Fleet, Ours
from tests.models_for_tests import perceptron, python_model

#: What preparing one item takes, beside 5 ms on the device.
PREPARE_S = 0.003
_WRAPPED = """
    import numpy as np
    import torch


    class Perceptron:
        def load(self, ctx):
            self.net = torch.jit.load(ctx.folder / "weights.pt", map_location=ctx.device)

        def predict(self, batch):
            return self.net(torch.from_numpy(np.stack(batch)))
"""
_STUB = """
    import time


    def spin(seconds):
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass


    class Stub:
        example = [0.0]

        def prepare(self, item: list):
            {prepare}
            return item

        def predict(self, batch):
            time.sleep({device} * len(batch) if batch[0][0] else 0)
            return batch
"""
#: The stub whose one thread does both, in turn.
_ONE_THREAD = """
    import time


    class Stub:
        example = [0.0]

        def predict(self, batch):
            time.sleep({both} * len(batch) if batch[0][0] else 0)
            return batch
"""
#: What prepares, and what is asked of it: the share of its time in which the device is idle, at most.
_KINDS: tuple[tuple[str, str, Target | None], ...] = (
    ("releases", "prepare without the GIL", Target(op="<=", value=5.0)),
    ("spins", "prepare in pure Python", None),
    ("alone", "one thread for both", None),
)


def write_python_models(folder: Path) -> None:
    """Write the models of this module; the number is the largest batch."""
    wrapped = perceptron(folder / "pyceptron")
    tables = (wrapped / "model.toml").read_text(encoding="utf-8").partition("\n\n")[2]
    shutil.move(wrapped / "model.pt", wrapped / "weights.pt")
    python_model(wrapped, _WRAPPED, tables)
    both = STEADY_S_PER_ITEM + PREPARE_S
    for size in (1, 32):
        codes = {
            "releases": _STUB.format(prepare=f"time.sleep({PREPARE_S})", device=STEADY_S_PER_ITEM),
            "spins": _STUB.format(prepare=f"spin({PREPARE_S})", device=STEADY_S_PER_ITEM),
            "alone": _ONE_THREAD.format(both=both),
        }
        for kind, code in codes.items():
            python_model(folder / f"{kind}{size}", code, f"max_batch_size = {size}\n")


def python(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """The perceptron in Python beside TorchScript's; then the stub's idle time, in batches of 1 and 32."""
    write_python_models(folder / "models")
    ours, script = [], []
    for _ in range(sizes.repeats):
        ours.append(backlog(Ours(folder, "pyceptron"), vectors(sizes.backlog)))
        script.append(backlog(Ours(folder), vectors(sizes.backlog)))
    what = f"Python model, backlog of {sizes.backlog:,}"
    yield compare(what, "tasks/s", ours, script, "TorchScript", Target(op=">=", value=0.9))
    for size in (1, 32):
        for kind, said, target in _KINDS:
            rates = []
            for _ in range(sizes.repeats):
                world = Fleet(folder, f"{kind}{size}", workers=1)
                rates.append(backlog(world, scalars(sizes.steady)))
            idle = 100 * (1 - median(rates) * STEADY_S_PER_ITEM)
            what = f"device idle, {said}, batches of {size}"
            yield Line(what=what, unit="%", ours=idle, target=target)
