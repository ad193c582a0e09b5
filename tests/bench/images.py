# SPDX-License-Identifier: Apache-2.0
"""Arrays the size of an image, from the client to a worker: how many a second, and Redis's part of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tests.bench.lines import Line, Sizes, Target
from tests.bench.stacks import Fleet

#: Images of one call of ``submit_many``.
AT_ONCE = 64


def images(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Send arrays of 3 x 224 x 224 float32, and wait for all results."""
    batch: NDArray[np.float32] = np.random.default_rng(1).random((AT_ONCE, 3, 224, 224), dtype=np.float32)
    rates, spent = [], []
    with Fleet(folder, "means", workers=1) as ours:
        ours.start()
        ours.client.results(ours.client.submit_many(batch[:8], model="means"), 120)
        for _ in range(sizes.repeats):
            before, began, ids = _redis_ms(ours), time.perf_counter(), []
            for _ in range(max(1, sizes.images // AT_ONCE)):
                ids += ours.client.submit_many(batch, model="means")
            ours.client.results(ids, 120)
            rates.append(len(ids) / (time.perf_counter() - began))
            spent.append((_redis_ms(ours) - before) / len(ids))
    target = Target(op=">=", value=600)
    yield Line(what="images as arrays", unit="1/s", ours=median(rates), target=target, repeats=(rates, ()))
    target = Target(op="<=", value=0.35)
    yield Line(what="  Redis an image", unit="ms", ours=median(spent), target=target, repeats=(spent, ()))


def _redis_ms(ours: Fleet) -> float:
    """Return the processor time that Redis has taken so far."""
    used = ours.raw.info("cpu")
    return 1000 * float(used["used_cpu_user"] + used["used_cpu_sys"])
