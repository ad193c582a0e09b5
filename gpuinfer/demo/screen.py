# SPDX-License-Identifier: Apache-2.0
"""The progress display of the demo: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from gpuinfer.demo.figures import percentile
from gpuinfer.demo.load import Answer, Load

#: Line width without a terminal.
PIPE_WIDTH = 110
#: Seconds between plain lines, and the window of rates and medians.
EVERY_S = 1.0


class Pace:
    """Counts answers and computes the rate over the last few seconds."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.singles = self.jobs = self.failed = 0
        self._seen = 0
        self._recent: list[Answer] = []

    def update(self) -> None:
        """Count the answers since the last call."""
        fresh = self.load.answers[self._seen :]
        self._seen += len(fresh)
        self.singles += sum(answer.tier == "realtime" for answer in fresh)
        self.jobs += sum(answer.tier == "batch" for answer in fresh)
        self.failed += sum(bool(answer.error) for answer in fresh)
        since = time.monotonic() - EVERY_S
        self._recent = [answer for answer in [*self._recent, *fresh] if answer.ended >= since]

    def realtime(self) -> str:
        """Return rate and median of realtime requests as text; empty if none came lately or all are done."""
        if self.load.burst_over:
            return ""
        mine = [answer.seconds for answer in self._recent if answer.tier == "realtime"]
        if not mine:
            return ""
        return f"{len(mine) / EVERY_S:,.0f}/s, p50 {percentile(mine, 0.5) * 1e3:.0f} ms"

    def batch(self) -> str:
        """Return the numbers of ended batch jobs and of failed requests as text."""
        text = f"{self.jobs:,} jobs of {self.load.images_per_job} images done"
        return f"{text}; {self.failed:,} requests FAILED" if self.failed else text


class Screen(Protocol):
    """Shows the demo's progress."""

    def service(self, name: str, what: str, ready: bool) -> None:
        """A service begins to start, or is ready."""

    def load(self, pace: Pace) -> None:
        """Show the state of the load; called about ten times per second."""

    def close(self) -> None:
        """Stop updating."""


class Lines:
    """Plain lines, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun: dict[str, tuple[float, str]] = {}
        self._last = time.monotonic()
        self._shown = ""

    def service(self, name: str, what: str, ready: bool) -> None:
        if not ready:
            self._begun[name] = time.monotonic(), what
            return
        begun, what = self._begun[name]
        label = f"{name} {what}".strip()
        self._console.print(f"{label}: ready after {time.monotonic() - begun:.1f} s", soft_wrap=True)

    def load(self, pace: Pace) -> None:
        if time.monotonic() - self._last < EVERY_S and pace.load.running:
            return
        self._last = time.monotonic()
        speed = pace.realtime()
        line = f"realtime {pace.singles:,} of {pace.load.total:,}{', ' + speed if speed else ''}"
        line += f"; batch {pace.batch()}"
        if line != self._shown:
            self._console.print(line, soft_wrap=True)
            self._shown = line

    def close(self) -> None:
        pass


class Seconds(ProgressColumn):
    """Seconds that a service has been starting, or took to start."""

    def render(self, task: Task) -> Text:
        took = task.finished_time if task.finished else task.elapsed
        return Text(f"{took or 0.0:5.1f} s", style="cyan" if task.finished else "dim")


class Bars:
    """Bars and spinners, for terminals."""

    def __init__(self, console: Console) -> None:
        self._console = console
        plain = not console.encoding.startswith("utf")
        self._spinner = SpinnerColumn("line" if plain else "dots", finished_text="*" if plain else "[green]✓")
        self._services: dict[str, TaskID] = {}
        self._bars: tuple[TaskID, TaskID] | None = None
        self._progress = self._start(
            self._spinner,
            TextColumn("{task.description:<10}"),
            TextColumn("[dim]{task.fields[what]}"),
            Seconds(),
        )

    def _start(self, *columns: ProgressColumn) -> Progress:
        progress = Progress(*columns, console=self._console, refresh_per_second=12)
        progress.start()
        return progress

    def service(self, name: str, what: str, ready: bool) -> None:
        if not ready:
            self._services[name] = self._progress.add_task(name, total=1, what=what)
        else:
            self._progress.update(self._services[name], completed=1)

    def load(self, pace: Pace) -> None:
        if self._bars is None:
            self._bars = self._begin_load(pace)
        single, jobs = self._bars
        done = f"{pace.singles:,}/{pace.load.total:,}"
        self._progress.update(single, completed=pace.singles, text=f"{done}  {pace.realtime()}")
        ended = not pace.load.running
        self._progress.update(
            jobs, total=pace.jobs if ended else None, completed=pace.jobs, text=pace.batch()
        )

    def _begin_load(self, pace: Pace) -> tuple[TaskID, TaskID]:
        self._progress.stop()
        self._progress = self._start(
            self._spinner,
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[text]}"),
        )
        single = self._progress.add_task("realtime", total=pace.load.total, text="")
        return single, self._progress.add_task("batch", total=None, text="")

    def close(self) -> None:
        self._progress.stop()


def console_for(*, to_stderr: bool) -> Console:
    """Return the console: standard error if standard output carries JSON."""
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def screen_for(console: Console) -> Screen:
    """Return bars for a terminal with cursor control, else plain lines."""
    return Bars(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


def show_log(console: Console, name: str, lines: Sequence[str]) -> None:
    """Show the end of a process's log."""
    console.print(f"\nthe last lines of {name}'s log:", style="bold")
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, markup=False)
