# SPDX-License-Identifier: Apache-2.0
"""The screen of ``gpuinfer status``: problems first, in the terminal's own colours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from gpuinfer.view import tables, words
from gpuinfer.view.columns import GAP, Cell
from gpuinfer.view.model import OUTCOMES, Curve, Status, Trouble

#: Width if the output is not a terminal, and the minimum width.
PIPE_WIDTH, LEAST_WIDTH = 120, 60
#: Minimum rows of workers and of problems on a terminal.
_LEAST_ROWS, _TROUBLES = 8, 8
_MARKS = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow")}
_OUTCOMES = {"dead": "dead letters", "not_run": "not run"}
_HEAD = "bold cyan"


def show(status: Status, console: Console | None = None) -> None:
    """Print it once."""
    console = console or Console(highlight=False, soft_wrap=True)
    width = console.width if console.is_terminal else PIPE_WIDTH
    rows = None if not console.is_terminal else console.height
    for line in lines(status, max(LEAST_WIDTH, width), rows):
        console.print(line, soft_wrap=True)


def live(look: Callable[[], Status], every_s: float, more: Callable[[], bool] = lambda: True) -> None:
    """Draw repeatedly until Ctrl-C, or while ``more()``; without a terminal, print screen after screen."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        while more():
            show(look(), console)
            console.print()
            time.sleep(every_s)
        return
    from rich.console import Group
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as drawn:
        while more():
            found = lines(look(), max(LEAST_WIDTH, console.width), console.height)
            drawn.update(Group(*list(found)[: console.height]), refresh=True)
            time.sleep(every_s)


def lines(status: Status, width: int, height: int | None = None) -> Iterator[Text]:
    """Yield the screen's lines. ``height``: rows of the terminal; None: no limit."""
    yield _title(status, width)
    yield from _troubles(status.troubles, width, height)
    if not status.redis.reachable:
        yield Text()
        yield from _access(status, width)
        return
    body = [*_queues(status, width), *_history(status, width), *_rest(status, width)]
    room = None if height is None else max(_LEAST_ROWS, height - len(body) - 2 * len(status.troubles) - 6)
    yield from _hosts(status, width)
    yield from _workers(status, width, room)
    yield from body


def _title(status: Status, width: int) -> Text:
    when = datetime.fromtimestamp(status.at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    left = Text().append(f"gpuinfer {status.version}", "bold").append(f"  {status.host}  {when}")
    errors = sum(one.severity == "error" for one in status.troubles)
    warnings = len(status.troubles) - errors
    parts = [_many(errors, "error"), _many(warnings, "warning")]
    said = ", ".join(part for part in parts if part) or "all is well"
    mark, style = _MARKS.get(status.severity or "", ("✓", "bold green"))
    right = f"{mark} {said}"
    left.append(" " * max(2, width - len(left.plain) - len(right)))
    return left.append(right, style)


def _many(number: int, word: str) -> str:
    return "" if not number else f"1 {word}" if number == 1 else f"{number} {word}s"


def _troubles(troubles: Sequence[Trouble], width: int, height: int | None) -> Iterator[Text]:
    most = len(troubles) if height is None else _TROUBLES
    for one in troubles[:most]:
        mark, style = _MARKS[one.severity]
        yield from _wrapped(Text().append(f"{mark} ", style), one.what, width)
        if one.remedy:  # never cut, so that it can be copied
            yield Text(f"  → {one.remedy}", "cyan")
    if len(troubles) > most:
        yield Text(f"  and {len(troubles) - most} more: gpuinfer status --json; gpuinfer doctor", "dim")


def _wrapped(first: Text, text: str, width: int) -> Iterator[Text]:
    """Yield a text behind its mark, its further lines indented."""
    indent, rest = len(first.plain), text
    line = first
    while rest:
        room = width - indent
        at = len(rest) if len(rest) <= room else rest.rfind(" ", 1, room + 1)
        at = room if at <= 0 else at
        yield line.append(rest[:at].rstrip())
        rest, line = rest[at:].lstrip(), Text(" " * indent)


def _labelled(label: str, text: str, width: int) -> Iterator[Text]:
    return _wrapped(Text().append(label, _HEAD), text, width)


def _heading(name: str, *said: str) -> Iterator[Text]:
    yield Text()
    yield Text().append(name, _HEAD).append("".join(f"  {part}" for part in said if part))


def _table(cells: Sequence[Sequence[Cell]]) -> Iterator[Text]:
    for row in cells:
        line = Text("  ")
        for place, cell in enumerate(row):
            line.append(" " * GAP if place else "").append(cell.text, cell.style or None)
        line.rstrip()
        yield line


def _hosts(status: Status, width: int) -> Iterator[Text]:
    if len(status.hosts) < 2:
        return
    yield from _heading("HOSTS")
    yield from _table(tables.hosts(status, width - 2))


def _workers(status: Status, width: int, room: int | None) -> Iterator[Text]:
    running = sum(worker.alive for worker in status.workers)
    said = f"{running} of {len(status.workers)} run"
    name = "GPUS AND WORKERS" if status.has_gpus else "WORKERS"
    rate = f"{words.rate(status.rate)} done" if running else ""
    yield from _heading(name, said, rate, f"{words.count(status.in_flight)} in flight" if running else "")
    if not status.workers:
        yield Text("  no worker has run yet, and no watcher has reported any", "dim")
        return
    rows = tables.chosen(status.workers, room)
    yield from _table(tables.workers(status, rows, width - 2))
    if len(rows) < len(status.workers):
        yield Text(f"  and {len(status.workers) - len(rows)} more, all well: gpuinfer status --json", "dim")


def _queues(status: Status, width: int) -> Iterator[Text]:
    shown = [one for one in status.queues if one.waiting or one.later or one.paused or one.rate]
    rest = len(status.queues) - len(shown)
    empty = "" if not rest else f"{_many(rest, 'queue')} empty" if shown else "all empty"
    yield from _heading("QUEUES", f"{words.count(status.waiting)} waiting", empty)
    if shown:
        yield from _table(tables.queues(status, shown, width - 2))


def _history(status: Status, width: int) -> Iterator[Text]:
    span = words.span(status.since_s)
    yield from _heading("LAST HOUR" if status.since_s == 3600 else f"LAST {span.upper()}", status.no_curves)
    names = [f"{one.name}{f' {one.unit}' if one.unit else ''}" for one in status.curves]
    longest = max(map(len, names), default=0)
    for name, one in zip(names, status.curves, strict=True):
        yield _curve(name.ljust(longest), one, width)


def _curve(name: str, one: Curve, width: int) -> Text:
    known = [value for value in (*one.values, one.now) if value is not None]
    said = f"  now {_figure(one.now)}, most {_figure(max(known, default=None))}"
    line = Text(f"  {name}  ").append(words.spark(one.values, width - len(name) - len(said) - 4), "green")
    return line.append(said)


def _figure(value: float | None) -> str:
    return words.NONE if value is None else f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _rest(status: Status, width: int) -> Iterator[Text]:
    yield Text()
    if status.ended is not None:
        parts = [
            f"{_OUTCOMES.get(name, name)} {words.count(status.ended.get(name, 0))}"
            for name in OUTCOMES
            if status.ended.get(name) or name in ("completed", "failed")
        ]
        yield from _labelled("ENDED   ", ", ".join(parts), width)
    yield from _redis(status, width)
    yield from _access(status, width)
    if status.decided:
        yield from _labelled("WATCHER ", words.cut(status.decided, 2 * width - 24), width)


def _redis(status: Status, width: int) -> Iterator[Text]:
    found = status.redis
    memory = ""
    if found.memory_used is not None:
        memory = f"{words.of(found.memory_used, found.memory_max)} used"
    parts = [f"{found.version} at {found.place}", memory]
    if found.appendfsync:
        parts.append(f"appendfsync {found.appendfsync}: {found.means}")
    yield from _labelled("REDIS   ", ", ".join(part for part in parts if part), width)


def _access(status: Status, width: int) -> Iterator[Text]:
    yield from _labelled("ACCESS  ", "; ".join(status.access), width)
