# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.bench [NAMES...] [--json FILE] [--plot FILE.png] [--quick] [--repeats N] [--aof]``."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from tests.bench.images import images
from tests.bench.lines import QUICK, Line, Sizes
from tests.bench.machine import CLIENT_CORE, machine, pinned, stolen_seconds, versions
from tests.bench.measures import idle, latency, redis_memory, steady, submission, throughput, worker_memory
from tests.bench.models import write_models
from tests.bench.photos import photos
from tests.bench.python import python
from tests.bench.report import Report, show, write_json
from tests.bench.scripts import claim_cost
from tests.bench.spread import speed_up, waits
from tests.bench.stacks import REDIS
from tests.bench.tuned import tuned

#: The measures by the names the command line takes, in their order.
MEASURES: dict[str, Callable[[Path, Sizes], Iterator[Line]]] = {
    "throughput": throughput,
    "tuned": tuned,
    "submission": submission,
    "latency": latency,
    "steady": steady,
    "spread": speed_up,
    "waits": waits,
    "claim": claim_cost,
    "images": images,
    "photos": photos,
    "python": python,
    "redis-memory": redis_memory,
    "worker-memory": worker_memory,
    "idle": idle,
}


@click.command(epilog="Measures: " + ", ".join(MEASURES) + ". All of them without a name.")
@click.argument("names", nargs=-1, type=click.Choice(list(MEASURES)), metavar="[NAMES]...")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything to a file.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the ratios into a PNG.")
@click.option("--quick", is_flag=True, help="Small sizes and one repeat: to see that it works.")
@click.option("--repeats", type=click.IntRange(1), help="How often each measure is taken; the median counts.")
@click.option("--aof", is_flag=True, help="Let each Redis keep an append-only file, with fsync everysec.")
def main(
    names: tuple[str, ...],
    json_file: Path | None,
    plot_file: Path | None,
    quick: bool,
    repeats: int | None,
    aof: bool,
) -> None:
    """Measure gpuinfer beside stock Celery, on a Redis of its own each, and print the table."""
    for name in [name for name in os.environ if name.startswith("GPUINFER_")]:
        del os.environ[name]  # the settings of whoever calls are none of the bench's
    console, progress = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)
    lines: list[Line] = []
    sizes = QUICK if quick else Sizes()
    sizes = replace(sizes, repeats=repeats or sizes.repeats)
    if aof:
        REDIS.update(appendonly="yes", appendfsync="everysec")
    about = machine() | {"redis": "AOF everysec" if aof else "no disk"}
    began, stolen = time.monotonic(), stolen_seconds()
    with tempfile.TemporaryDirectory(prefix="gi-bench-") as folder, pinned(CLIENT_CORE):
        write_models(Path(folder) / "models")
        for name in names or MEASURES:
            with progress.status(name):
                lines += MEASURES[name](Path(folder), sizes)
    cores_s = (os.cpu_count() or 1) * (time.monotonic() - began)
    about["stolen_percent"] = round(100 * (stolen_seconds() - stolen) / cores_s, 1)
    report = Report(versions=versions(), machine=about, lines=lines, quick=quick)
    show(report, console)
    if json_file is not None:
        write_json(report, json_file)
    if plot_file is not None:
        from tests.bench.plot import draw

        draw(report, plot_file)


if __name__ == "__main__":
    main()
