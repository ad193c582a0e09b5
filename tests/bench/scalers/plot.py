# SPDX-License-Identifier: Apache-2.0
"""The picture of a comparison: what waited, what ran, how long tasks waited and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuinfer.watcher.simulator.run import Outcome, least
from tests.bench.scalers.report import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "gpuinfer": "#c0392b",
    "tutorial": "#7f8c8d",
    "keda": "#2f6f9f",
    "hpa": "#3a8f5c",
    "bound": "#bbbbbb",
}


def draw(comparisons: Sequence[Comparison], file: Path) -> None:
    """Draw one trace's course, or several traces side by side."""
    figure = _figure(*((9.0, 8.0) if len(comparisons) == 1 else (9.0, 1.2 + 0.75 * len(comparisons))))
    if len(comparisons) == 1:
        _course(figure, comparisons[0])
    else:
        _overview(figure, comparisons)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _figure(width: float, height: float) -> Any:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["font.size"] = 9
    return Figure(figsize=(width, height), layout="constrained")


def _course(figure: Any, one: Comparison) -> None:
    """Draw depth and workers over time, and below them waits and GPU-seconds."""
    axes = figure.subplots(3, 1, height_ratios=[3, 3, 2])
    players = [one.ours, *one.peers]
    for outcome in players:
        times = [one[0] / 60 for one in outcome.probes]
        style: dict[str, Any] = {"color": COLOURS[outcome.policy], "lw": 1.4, "label": outcome.policy}
        axes[0].plot(times, [one[1] for one in outcome.probes], **style)
        axes[1].step(times, [one[2] + one[3] for one in outcome.probes], where="post", **style)
    axes[0].set_yscale("symlog", linthresh=10)
    axes[0].set_ylabel("tasks waiting")
    axes[0].set_title(f"{one.scenario.name}: {one.scenario.trace.tasks} tasks, {one.scenario.gpus} GPUs")
    axes[0].legend(ncols=len(players), fontsize=8, frameon=False)
    axes[1].set_ylabel("workers that run")
    axes[1].set_xlabel("minutes")
    _costs(axes[2], one, players)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)


def _costs(axes: Axes, one: Comparison, players: Sequence[Outcome]) -> None:
    """Draw a bar of GPU-seconds for each policy, its waits behind it, and a mark at the least possible."""
    places = range(len(players))
    axes.barh(places, [o.gpu_s for o in players], color=[COLOURS[o.policy] for o in players], height=0.6)
    for place, outcome in zip(places, players, strict=True):
        text = f" p50 {outcome.p50_s:.2f} s, p99 {outcome.p99_s:.2f} s"
        axes.text(outcome.gpu_s, place, text, va="center", fontsize=8)
    axes.axvline(least(one.scenario), color="black", lw=1, ls=":")
    axes.set_yticks(places, [outcome.policy for outcome in players])
    axes.set_xlim(0, 1.35 * max(outcome.gpu_s for outcome in players))
    axes.set_xlabel("GPU-seconds; dotted: the least possible")
    axes.invert_yaxis()


def _overview(figure: Any, comparisons: Sequence[Comparison]) -> None:
    """Draw p99 and GPU-seconds of every policy on every trace."""
    left, right = figure.subplots(1, 2, sharey=True)
    for rank, name in enumerate(("gpuinfer", "tutorial", "keda", "hpa")):
        chosen = [next(o for o in one.outcomes if o.policy == name) for one in comparisons]
        places = [row + 0.2 * (rank - 1.5) for row in range(len(comparisons))]
        style: dict[str, Any] = {"height": 0.18, "color": COLOURS[name], "label": name}
        left.barh(places, [max(outcome.p99_s, 0.01) for outcome in chosen], **style)
        right.barh(places, [outcome.over_least for outcome in chosen], **style)
    left.set_xscale("log")
    right.set_xscale("log")
    left.set_xlabel("p99 waiting time, seconds")
    right.set_xlabel("GPU-seconds, times the least possible")
    left.set_yticks(range(len(comparisons)), [one.scenario.name for one in comparisons])
    left.invert_yaxis()
    right.legend(fontsize=8, frameon=False)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
