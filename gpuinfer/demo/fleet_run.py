# SPDX-License-Identifier: Apache-2.0
"""Runs ``gpuinfer demo --fleet``: load and faults under the status screen, then a comparison of outcomes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import click
import orjson
from rich.console import Console

from gpuinfer.demo.fleet import Fleet, fleet
from gpuinfer.demo.private import CONFIG, START_TIMEOUT_S
from gpuinfer.demo.screen import console_for
from gpuinfer.demo.summary import show_commands
from gpuinfer.log import configure
from gpuinfer.view.build import build
from gpuinfer.view.gather import Gatherer
from gpuinfer.view.model import Status
from gpuinfer.view.screen import live

#: Maximum seconds for accepted tasks to end after the load has stopped.
DRAIN_S = 120.0
#: Default duration in seconds without a terminal.
_UNATTENDED_S = 30.0
_EVERY_S = 1.0


def run(seconds: float | None, *, as_json: bool) -> int:
    """Run for ``seconds``, or until Ctrl-C. Returns 0 if every task had its expected outcome, else 1."""
    console = console_for(to_stderr=as_json)
    console.print("gpuinfer demo --fleet: two simulated hosts, eight simulated GPUs, three models")
    with fleet() as made, (made.folder / "fleet.log").open("w", encoding="utf-8") as log:
        configure(made.loaded.settings.log, program="gpuinfer-demo", stream=log)
        made.start()
        with made.client() as client:
            made.await_models(client, time.monotonic() + START_TIMEOUT_S)
        _tell(made, console)
        made.driver.start()
        attended = console.is_terminal and not as_json
        if seconds is None and not attended:
            seconds = _UNATTENDED_S
        _go(made, seconds, attended=attended)
        console.print("the load has stopped; waiting for the remaining tasks ...")
        drained = made.drain(DRAIN_S)
        with Gatherer(made.loaded) as gatherer:
            found = build(gatherer.look())
    return _account(made.driver.to_dict(), found, console, drained=drained, as_json=as_json)


def _tell(made: Fleet, console: Console) -> None:
    show_commands(
        console,
        "The fleet is running. In another terminal:",
        [
            (f"export GPUINFER_CONFIG={made.folder / CONFIG}", "lets gpuinfer's commands use it"),
            ("gpuinfer status", "this screen"),
            ("gpuinfer top", "this screen, with actions"),
            (f"tail -f {made.folder}/fleet.log", "log of watchers and workers"),
        ],
    )


def _go(made: Fleet, seconds: float | None, *, attended: bool) -> None:
    """Run the load and the faults until the time is over or Ctrl-C."""
    until = time.monotonic() + seconds if seconds is not None else float("inf")

    def more() -> bool:
        made.step()
        return time.monotonic() < until

    try:
        if attended:
            with Gatherer(made.loaded) as gatherer:
                live(lambda: build(gatherer.look()), _EVERY_S, more)
        else:
            while more():
                time.sleep(0.1)
    except KeyboardInterrupt:
        if not attended:
            raise


def _account(
    sent: Mapping[str, Mapping[str, int]], found: Status, console: Console, *, drained: bool, as_json: bool
) -> int:
    ended = {queue: {**outcomes} for queue, outcomes in found.ended_by_queue.items()}
    equal = drained and ended == {queue: {**outcomes} for queue, outcomes in sent.items()}
    if as_json:
        body: dict[str, Any] = {"ok": equal, "submitted": sent, "ended": ended, "status": found.to_dict()}
        click.echo(orjson.dumps(body, option=orjson.OPT_INDENT_2))
    else:
        totals: Counter[str] = Counter()
        for outcomes in sent.values():
            totals.update(outcomes)
        parts = ", ".join(f"{name} {count:,}" for name, count in sorted(totals.items()))
        said = "all with the expected outcome" if equal else f"UNEXPECTED outcomes: {ended} instead of {sent}"
        console.print(f"submitted {sum(totals.values()):,}: {parts}; {said}", markup=False)
    return 0 if equal else 1
