# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer demo``."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples

if TYPE_CHECKING:
    from rich.console import Console

    from gpuinfer.demo.figures import Figures
    from gpuinfer.demo.load import Answer
    from gpuinfer.demo.screen import Screen
    from gpuinfer.demo.stack import Stack

#: Concurrent realtime requests, and concurrent batch jobs.
IN_FLIGHT, JOBS = 32, 2
_REFRESH_S = 0.1


@click.command(epilog=examples("gpuinfer demo --keep", "gpuinfer demo --fleet"))
@click.option("--keep", is_flag=True, help="Keep everything running afterwards, until Ctrl-C.")
@click.option(
    "--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Number of workers."
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    help="How many times each test image is sent.",
)
@click.option("--fleet", is_flag=True, help="Simulate two hosts with eight GPUs, and some faults, instead.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1, max=86400),
    metavar="SECONDS",
    help="Duration of the load with --fleet. Default: until Ctrl-C; without a terminal, 30.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the figures as JSON on stdout; everything else goes to stderr.",
)
def demo(keep: bool, workers: int, rounds: int, fleet: bool, seconds: float | None, as_json: bool) -> int:
    """Try gpuinfer on this host: a private Redis, workers, the API and requests.

    The demo runs in a temporary folder, which is deleted at the end. It does not touch an installed gpuinfer,
    its settings or its Redis. Workers use this host's GPUs, or the CPU if there are none. If you are root,
    the demo runs as the workers' user.

    It sends every test image of the shipped model over HTTP while batch jobs run, and compares the results
    with those of calling the model directly. Exit code 0: every request got the same result; 1: it did not.
    130: Ctrl-C, which also cleans up and ends --keep.

    --fleet needs no GPU and loads no model: workers are threads that sleep, but queues, watchers and results
    are real. One task kills its workers, one GPU fails, one queue is paused, and gpuinfer status shows it.
    At the end the submitted tasks are compared with the ended ones (exit code 0: equal).
    """
    from gpuinfer.demo.private import end_in_order
    from gpuinfer.demo.screen import console_for, screen_for
    from gpuinfer.demo.stack import plan, started
    from gpuinfer.journal.sender import say_warning
    from gpuinfer.privileges import leave_root

    leave_root(say_warning)
    end_in_order()
    if fleet:
        from gpuinfer.demo import fleet_run

        return fleet_run.run(seconds, as_json=as_json)
    begun = time.monotonic()
    devices = plan(workers, os.environ)
    console = console_for(to_stderr=as_json)
    console.print(f"gpuinfer demo: a private Redis, the API, {_count(workers)} on {devices.summary}")
    if devices.note:
        console.print(f"note: {devices.note}", style="yellow", markup=False)
    screen = screen_for(console)
    try:
        with started(devices, screen.service) as stack:
            found = _run(stack, screen, console, rounds)
            _report(found, console, as_json, time.monotonic() - begun)
            if keep:
                _keep(stack, console)
    finally:
        screen.close()
    if not keep and not as_json:
        _next_steps(console)
    return 0 if found.ok else 1


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _run(stack: Stack, screen: Screen, console: Console, rounds: int) -> Figures:
    """Start everything, run the load and return the figures. Raises ProcessEnded, ConfigError."""
    from gpuinfer.demo.figures import figures
    from gpuinfer.demo.processes import ProcessEnded
    from gpuinfer.demo.screen import show_log
    from gpuinfer.models.shipped import load_test_images

    images, labels = load_test_images()
    try:
        stack.start()
        answers = _load(stack, screen, images.tolist(), rounds)
    except ProcessEnded:
        screen.close()
        failed = stack.failed()
        if failed is not None:
            show_log(console, failed.name, failed.tail())
        raise
    screen.close()
    return figures(answers, labels.tolist(), stack.direct, list(stack.batches()), len(stack.workers))


def _load(stack: Stack, screen: Screen, images: list[Any], rounds: int) -> list[Answer]:
    from gpuinfer.demo.load import Load
    from gpuinfer.demo.screen import Pace

    load = Load(stack.url, images, rounds=rounds, in_flight=IN_FLIGHT, jobs=JOBS)
    pace = Pace(load)
    load.start()
    try:
        while load.running:
            time.sleep(_REFRESH_S)
            stack.check()
            pace.update()
            screen.load(pace)
    finally:
        load.abandon()
    return load.answers


def _report(found: Figures, console: Console, as_json: bool, elapsed_s: float) -> None:
    from gpuinfer.demo.summary import show_table

    if as_json:
        click.echo(json.dumps({**found.as_dict(), "elapsed_s": round(elapsed_s, 1)}, indent=2))
    else:
        show_table(console, found)


def _keep(stack: Stack, console: Console) -> None:
    """Keep the stack running until Ctrl-C. Raises ProcessEnded if a process ends."""
    from gpuinfer.demo.summary import show_kept
    from gpuinfer.models.shipped import load_test_images

    images, _ = load_test_images()
    digit = stack.folder / "digit.json"
    digit.write_text(json.dumps(images[0].tolist()))  # for the API and `gpuinfer submit`
    show_kept(console, stack.url, stack.folder, digit)
    try:
        while True:
            time.sleep(_REFRESH_S)
            stack.check()
    except KeyboardInterrupt:
        console.print("stopping ...")


def _next_steps(console: Console) -> None:
    from gpuinfer.demo.summary import show_next_steps

    show_next_steps(console)
