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

#: Realtime requests in flight, and batch jobs.
IN_FLIGHT, JOBS = 32, 2
_REFRESH_S = 0.1


@click.command(epilog=examples("gpuinfer demo --keep", "gpuinfer demo --fleet"))
@click.option("--keep", is_flag=True, help="Keep everything running at the end, until Ctrl-C.")
@click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="How many workers.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    help="How often each test image is sent.",
)
@click.option("--fleet", is_flag=True, help="Simulate two hosts with eight GPUs instead, with faults.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1, max=86400),
    metavar="SECONDS",
    help="How long the fleet's load lasts. Default: until Ctrl-C; without a terminal, 30.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, everything else on stderr.")
def demo(keep: bool, workers: int, rounds: int, fleet: bool, seconds: float | None, as_json: bool) -> int:
    """Try everything here: a private Redis, workers, the API, requests.

    It runs in a temporary folder, which is deleted at the end; this host's own gpuinfer, its settings and
    its Redis are not changed. Workers run on this host's GPUs, or on the CPU where there is none. Started by
    root, it runs as the workers' user.

    Every test image of the shipped model is sent over HTTP while batch jobs run. Exit code 0: every request
    was answered, with the result that the model gives when called directly; else 1. Ctrl-C cleans up, too
    (130), and ends --keep.

    --fleet needs no GPU and loads no model: its workers are threads that sleep, with real queues, watchers
    and results. One task kills its workers, one GPU is lost, one queue is paused. It shows gpuinfer status
    meanwhile. At the end it compares the submitted tasks with those that ended (exit code 0: equal).
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
        _go_on(console)
    return 0 if found.ok else 1


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _run(stack: Stack, screen: Screen, console: Console, rounds: int) -> Figures:
    """Start everything, put the load on it and return the figures. Raises ProcessEnded, ConfigError."""
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
    """Leave the stack up until Ctrl-C. Raises ProcessEnded when a part of it ends."""
    from gpuinfer.demo.summary import show_kept
    from gpuinfer.models.shipped import load_test_images

    images, _ = load_test_images()
    digit = stack.folder / "digit.json"
    digit.write_text(json.dumps(images[0].tolist()))  # as the API takes it, and `gpuinfer submit`
    show_kept(console, stack.url, stack.folder, digit)
    try:
        while True:
            time.sleep(_REFRESH_S)
            stack.check()
    except KeyboardInterrupt:
        console.print("ending ...")


def _go_on(console: Console) -> None:
    from gpuinfer.demo.summary import show_how_to_go_on

    show_how_to_go_on(console)
