# SPDX-License-Identifier: Apache-2.0
"""What a run says: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.lines import Line


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One whole run."""

    versions: Mapping[str, str]
    machine: Mapping[str, str | int | float]
    lines: Sequence[Line]
    quick: bool

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "quick": self.quick,
            "lines": [_as_dict(line) for line in self.lines],
        }


def _as_dict(line: Line) -> dict[str, Any]:
    target = line.target
    return {
        "what": line.what.strip(),
        "unit": line.unit,
        "ours": line.ours,
        "beside": line.beside,
        "other": line.other,
        "ratio": line.ratio,
        "target": None if target is None else f"{target.op} {target.value:g}",
        "met": line.met,
        "repeats": [list(series) for series in line.repeats],
    }


def write_json(report: Report, file: Path) -> None:
    """Write the run to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")


def figure(value: float | None) -> str:
    """Return a number with three digits that count."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def show(report: Report, console: Console) -> None:
    """Print versions, the machine and the table."""
    machine = report.machine
    console.print(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    about = (
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Redis: {machine['redis']}"
    )
    console.print(about)
    stolen = machine["stolen_percent"]
    console.print(f"{stolen} % of the processor time meanwhile went to others on the machine under this one")
    if report.quick:
        console.print("--quick: small sizes, one repeat; the figures are rough")
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("measure", "unit", "gpuinfer", "beside", "", "ratio", "target", "met"):
        left = name in ("measure", "unit", "beside")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for line in report.lines:
        table.add_row(*_cells(line))
    console.print(table)


def _cells(line: Line) -> tuple[str, ...]:
    target, met = line.target, line.met
    return (
        line.what,
        line.unit,
        figure(line.ours),
        line.beside or "",
        figure(line.other),
        "" if line.ratio is None else f"{line.ratio:.3g}",
        "" if target is None else f"{target.op} {target.value:g}",
        {None: "", True: "yes", False: "NO"}[met],
    )
