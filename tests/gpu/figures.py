# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpu.figures NETWORK``: a bare loop beside the worker, for each batch size.

The worker works off a backlog. Its log says how long that took: from the start of the first batch to the end
of the last. What overlaps follows from two times: the steps of a batch one after another, and a batch in all.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

from gpuinfer import Client
from gpuinfer.models.repository import Repository
from gpuinfer.settings import BrokerSettings, Settings
from tests.gpu.conftest import entries
from tests.gpu.dry import dry_run
from tests.gpu.loops import STEPS, Loop
from tests.gpu.networks import NETWORKS, Network
from tests.gpu.records import tell, tell_check
from tests.services import Process, RedisServer, ServiceError
from tests.workers import Workers

#: Different inputs; the backlog repeats them.
DIFFERENT = 256
LOOP_S, STEP_RUNS = (0.2, 5) if dry_run() else (1.0, 30)
#: How long a backlog may take.
WORK_LIMIT_S = 90.0
#: A part of a batch that is hidden, or left over, counts from this share of it.
COUNTS_FROM = 0.1


@dataclass(frozen=True, kw_only=True)
class Worked:
    """What the worker's log says of a backlog."""

    items: int
    batches: int
    #: From the start of the first batch to the end of the last.
    seconds: float
    #: What a batch takes in the inference thread, on average.
    thread_ms: float

    @classmethod
    def of(cls, worker: Process) -> Worked:
        """Read a worker's log."""
        done = entries(worker, "batch_done")
        ends = [datetime.fromisoformat(entry["timestamp"]).timestamp() for entry in done]
        began = ends[0] - done[0]["duration_ms"] / 1000
        return cls(
            items=_items(worker),
            batches=len(done),
            seconds=ends[-1] - began,
            thread_ms=mean(entry["duration_ms"] for entry in done),
        )


def _wait(worker: Process, count: int) -> None:
    """Wait until a worker's log tells of so many items: whoever waits for results makes work of his own."""
    until = time.monotonic() + WORK_LIMIT_S
    while _items(worker) < count:
        if not worker.running or time.monotonic() > until:
            raise ServiceError(f"{_items(worker)} of {count} items are done\n{worker.tail()}")
        time.sleep(0.1)
    if failed := sum(entry["failed"] for entry in entries(worker, "batch_done")):
        raise ServiceError(f"{failed} items failed\n{worker.tail()}")


def _items(worker: Process) -> int:
    return sum(entry["batch_size"] for entry in entries(worker, "batch_done"))


def work_off(folder: Path, name: str, values: Sequence[Any], batch: int) -> Worked:
    """Let a worker work off a backlog in batches of one size. Raises the error of a task that failed."""
    folder.mkdir()
    redis = RedisServer()
    workers = Workers(redis, folder)
    try:
        with Client(Settings(broker=BrokerSettings(url=redis.url))) as client:
            tasks = client.submit_many(values, model=name)
            models = folder.parent / "models"
            worker = workers.start(0, models_folders=models, worker_models=name, worker_max_batch_size=batch)
            _wait(worker, len(tasks))
            for task in (tasks[0], tasks[-1]):
                client.result(task, timeout_s=10)
        return Worked.of(worker)
    finally:
        workers.close()
        redis.close()


def row(name: str, batch: int, bare_per_s: float, steps: dict[str, float], worked: Worked) -> dict[str, Any]:
    """Put one line of figures together."""
    wall_ms = 1000 * worked.seconds / worked.batches
    alone_ms = sum(steps.values())
    hidden_ms, gap_ms = max(0.0, alone_ms - wall_ms), max(0.0, wall_ms - worked.thread_ms)
    device_ms = steps["copy"] + steps["run"] + steps["back"]
    figures: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "mean_batch": worked.items / worked.batches,
        "items": worked.items,
        "bare_per_s": bare_per_s,
        "worker_per_s": worked.items / worked.seconds,
        "ratio": worked.items / worked.seconds / bare_per_s,
        "device_busy_pct": min(100.0, 100 * device_ms / wall_ms),
        **{f"{step}_ms": steps[step] for step in STEPS},
        "thread_ms": worked.thread_ms,
        "wall_ms": wall_ms,
        "hidden_ms": hidden_ms,
        "gap_ms": gap_ms,
    }
    return figures | {"overlaps": overlaps(figures)}


def overlaps(figures: dict[str, Any]) -> str:
    """Return in words what runs while the device works.

    On one device copy, run and back cannot hide each other: what is saved is saved of decode and render.
    """
    alone_ms = sum(figures[f"{step}_ms"] for step in STEPS)
    words = []
    if figures["hidden_ms"] > COUNTS_FROM * alone_ms:
        words.append("decode, render")
    if figures["gap_ms"] < COUNTS_FROM * figures["wall_ms"]:
        words.append("queue")
    return " + ".join(words) or "nothing"


def measure(name: str, network: Network, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch size."""
    numbers = random.Random(6)  # noqa: S311  no secret
    different = [network.one(numbers) for _ in range(DIFFERENT)]
    network.write(folder / "models" / name)
    loop = Loop(Repository([folder / "models"]).get(name))
    for batch, count in network.items.items():
        values = [different[place % DIFFERENT] for place in range(count)]
        bare_per_s = loop.rate(different[:batch], LOOP_S)
        steps = loop.steps(different[:batch], STEP_RUNS)
        yield row(name, batch, bare_per_s, steps, work_off(folder / str(batch), name, values, batch))


def main(name: str) -> None:
    """Tell each row as soon as it is there."""
    for variable in [variable for variable in os.environ if variable.startswith("GPUINFER_")]:
        del os.environ[variable]  # the settings of whoever calls are none of the figures'
    network = NETWORKS[name]
    with tempfile.TemporaryDirectory(prefix="gi-figures-") as folder:
        begun = time.monotonic()
        for figures in measure(name, network, Path(folder)):
            whole = figures["items"] == network.items[figures["batch"]]
            failure = "" if whole else f"its log tells of {figures['items']} items"
            tell(figures=[figures])
            tell_check(f"{name} in batches of {figures['batch']}", time.monotonic() - begun, failure)
            begun = time.monotonic()


if __name__ == "__main__":
    main(sys.argv[1])
