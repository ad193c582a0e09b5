# SPDX-License-Identifier: Apache-2.0
"""The picture for the README: how many times better than stock Celery, and how near a bare loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.lines import Line
from tests.bench.report import Report, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR, _MISSED, _TARGET, _TEXT = "#2f6f9f", "#c0553a", "#222222", "#444444"
_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200)
#: What is measured in units where less is better.
_LESS_IS_BETTER = ("us", "ms", "bytes")


def draw(report: Report, file: Path) -> None:
    """Draw two panels of bars, each with a mark at its target."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["font.size"] = 9
    compared = [line for line in report.lines if line.target is not None and line.ratio is not None]
    loops = [line for line in compared if line.beside == "bare loop"]
    stock = [line for line in compared if line.beside in ("stock Celery", "delay()", "delay() in a loop")]
    panels = [(rows, name) for rows, name in ((stock, "stock Celery"), (loops, "a bare loop")) if rows]
    if not panels:
        return
    bars = sum(len(rows) for rows, _ in panels)
    whole = Figure(figsize=(8.4, 0.9 + 0.42 * (bars + len(panels))), layout="constrained", dpi=110)
    heights = [len(rows) + 0.8 for rows, _ in panels]
    axes = whole.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (rows, name) in zip(axes, panels, strict=True):
        _panel(panel, rows, f"gpuinfer beside {name}: times better; the mark is the target")
    machine = report.machine
    whole.supxlabel(
        f"{machine['cpu']}, {machine['cores']} cores, celery {report.versions['celery']}, "
        f"redis-server {report.versions['redis-server']}, torch {report.versions['torch']}",
        fontsize=7,
        color=_TEXT,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    whole.savefig(file, metadata={"Software": None})


def _gain(line: Line, ratio: float) -> float:
    """Return a ratio as how many times better."""
    return 1 / ratio if line.unit in _LESS_IS_BETTER else ratio


def _panel(axes: Axes, lines: Sequence[Line], title: str) -> None:
    """Draw one bar a line, its figures behind it, its target as a mark."""
    gains = [_gain(line, line.ratio or 0.0) for line in lines]
    goals = [_gain(line, line.target.value) if line.target else 0.0 for line in lines]
    places = range(len(lines))
    colours = [_BAR if line.met else _MISSED for line in lines]
    axes.barh(places, gains, height=0.62, color=colours, label="measured")
    axes.vlines(goals, [p - 0.42 for p in places], [p + 0.42 for p in places], color=_TARGET, lw=2)
    for place, line, gain, goal in zip(places, lines, gains, goals, strict=True):
        text = f" {gain:.3g} times   {figure(line.ours)} beside {figure(line.other)} {line.unit}"
        axes.text(max(gain, goal), place, text, va="center", fontsize=8, color=_TEXT)
    most = max([*gains, *goals])
    ticks = [tick for tick in _TICKS if tick < 1.1 * most]
    axes.set_xscale("log" if most > 2 else "linear")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim((0.5, 15 * most) if most > 2 else (0, 1.75 * most))
    axes.set_yticks(places, [line.what for line in lines])
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
