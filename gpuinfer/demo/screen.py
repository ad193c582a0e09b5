# SPDX-License-Identifier: Apache-2.0
"""What the demo shows while it runs: bars on a terminal, plain lines elsewhere. Everything is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from gpuinfer.demo.figures import percentile
from gpuinfer.demo.load import Answer, Load

#: Width of lines that go to no terminal.
PIPE_WIDTH = 110
#: Plain lines come this often; rates and medians are of this long a while.
EVERY_S = 1.0


class Pace:
    """Counts answers as they come, and tells the pace of the last while."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.singles = self.jobs = self.failed = 0
        self._seen = 0
        self._recent: list[Answer] = []

    def update(self) -> None:
        """Count what has come since the last call."""
        fresh = self.load.answers[self._seen :]
        self._seen += len(fresh)
        self.singles += sum(answer.tier == "realtime" for answer in fresh)
        self.jobs += sum(answer.tier == "batch" for answer in fresh)
        self.failed += sum(bool(answer.error) for answer in fresh)
        since = time.monotonic() - EVERY_S
        self._recent = [answer for answer in [*self._recent, *fresh] if answer.ended >= since]

    def realtime(self) -> str:
        """Return the pace of realtime requests in words; empty when none came lately, or all are done."""
        if self.load.burst_over:
            return ""
        mine = [answer.seconds for answer in self._recent if answer.tier == "realtime"]
        if not mine:
            return ""
        return f"{len(mine) / EVERY_S:,.0f}/s, p50 {percentile(mine, 0.5) * 1e3:.0f} ms"

    def batch(self) -> str:
        """Return how many batch jobs have ended, and how many requests have failed if any."""
        text = f"{self.jobs:,} jobs of {self.load.images_per_job} images done"
        return f"{text}; {self.failed:,} requests FAILED" if self.failed else text


class Screen(Protocol):
    """What shows the demo's course."""

    def service(self, name: str, what: str, ready: bool) -> None:
        """A service begins to start, or is ready."""

    def load(self, pace: Pace) -> None:
        """The load goes on; called some ten times a second."""

    def close(self) -> None:
        """Nothing moves any more."""


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
    """How long a service has been starting, or took to start."""

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
    """Return the console to show things on; beside JSON on standard output it is standard error."""
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def screen_for(console: Console) -> Screen:
    """Return bars for a terminal that can move its cursor, lines for everything else."""
    return Bars(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


def show_log(console: Console, name: str, lines: Sequence[str]) -> None:
    """Show the end of a process's log."""
    console.print(f"\nthe last lines of {name}'s log:", style="bold")
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, markup=False)
