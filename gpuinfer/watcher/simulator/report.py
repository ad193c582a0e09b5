# SPDX-License-Identifier: Apache-2.0
"""The outcome of a simulation as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gpuinfer.watcher.simulator.run import Outcome, Scenario, least

COLUMNS = ("policy", "p50 s", "p99 s", "GPU-s", "x least", "starts", "stops", "most", "left")


def table(scenario: Scenario, outcomes: Sequence[Outcome]) -> str:
    """Return a line for each policy: waiting times, GPU-seconds, starts, stops, the most that ran."""
    head = (
        f"{scenario.name}: {scenario.trace.tasks} tasks, {scenario.gpus} GPUs, floor {scenario.floor}, "
        f"least {least(scenario):.0f} GPU-s"
    )
    rows = [COLUMNS, *map(_row, outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        )
        for first, *rest in rows
    ]
    return "\n".join([head, *(f"  {line}".rstrip() for line in lines)])


def _row(one: Outcome) -> tuple[str, ...]:
    seconds = (f"{one.p50_s:.2f}", f"{one.p99_s:.2f}", f"{one.gpu_s:.0f}", f"{one.over_least:.2f}")
    return (one.policy, *seconds, str(one.starts), str(one.stops), str(one.most), str(one.unserved))


def to_dict(scenario: Scenario, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return it for JSON, with numbers rounded to a thousandth, and without the time line."""
    return {
        "trace": scenario.name,
        "tasks": scenario.trace.tasks,
        "gpus": scenario.gpus,
        "floor": scenario.floor,
        "model": asdict(scenario.model),
        "least_gpu_s": round(least(scenario), 1),
        "policies": [plain(one) for one in outcomes],
    }


def plain(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome for JSON."""
    values = {key: value for key, value in asdict(outcome).items() if key != "probes"}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}
