# SPDX-License-Identifier: Apache-2.0
"""What a run says: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class Outcome:
    """What came of one part."""

    name: str
    limit_s: float
    seconds: float = 0.0
    #: Why it failed as a whole; empty when it did not.
    reason: str = ""
    #: One a test: ``what``, ``ok``, ``seconds``, ``detail``.
    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Tell whether it ran to its end and each of its checks passed."""
        return not self.reason and all(check["ok"] for check in self.checks)


@dataclass(kw_only=True)
class Report:
    """One whole run."""

    dry_run: bool
    #: Card, driver, torch, CUDA, Python, our versions.
    about: dict[str, Any] = field(default_factory=dict)
    parts: list[Outcome] = field(default_factory=list)
    #: One row a model and batch size.
    figures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Tell whether every part passed."""
        return bool(self.parts) and all(part.ok for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        parts = [{**asdict(part), "ok": part.ok} for part in self.parts]
        return {**asdict(self), "parts": parts, "ok": self.ok}


def write(report: Report, folder: Path, name: str) -> None:
    """Write the JSON file, and the table beside it."""
    (folder / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.txt").write_text("\n".join(lines(report)) + "\n", encoding="utf-8")


def lines(report: Report) -> Iterator[str]:
    """Yield the table's lines."""
    if report.dry_run:
        yield "DRY RUN: no GPU was used; CUDA and NVML are stubs, sizes are small, the figures mean nothing"
    yield ", ".join(f"{key} {value}" for key, value in report.about.items()) or "nothing is known of the card"
    yield ""
    yield from _aligned([["part", "what", "result", "seconds"], *_rows(report)], left=3)
    if report.figures:
        yield ""
        yield from _aligned([list(COLUMNS.values()), *map(_figures, report.figures)], left=1)
        yield ""
        yield from NOTES
    failed = [part.name for part in report.parts if not part.ok]
    yield ""
    yield f"{'FAILED: ' + ', '.join(failed) if failed else 'all passed'} ({report.seconds:.0f} s)"


def _rows(report: Report) -> Iterator[list[str]]:
    for part in report.parts:
        for check in part.checks:
            result = "ok" if check["ok"] else f"FAILED: {check['detail']}"
            yield [part.name, check["what"], result, f"{check['seconds']:.1f}"]
        if part.reason or not part.checks:
            result = f"FAILED: {part.reason}" if part.reason else "ok"
            yield [part.name, "", result, f"{part.seconds:.1f}"]


#: Key of a row of figures -> the head of its column.
COLUMNS: Mapping[str, str] = {
    "model": "model",
    "batch": "batch",
    "bare_per_s": "bare/s",
    "worker_per_s": "worker/s",
    "ratio": "ratio",
    "device_busy_pct": "busy %",
    "decode_ms": "decode",
    "copy_ms": "copy",
    "run_ms": "run",
    "back_ms": "back",
    "render_ms": "render",
    "thread_ms": "thread",
    "wall_ms": "wall",
    "hidden_ms": "hidden",
    "gap_ms": "gap",
    "overlaps": "overlaps",
}
NOTES = (
    "bare: a loop that copies a batch to the device, runs it and copies the outputs back",
    "worker: gpuinfer worker, with a backlog",
    "busy: the share of the worker's time in which the device copies or runs, from the bare loop's times",
    "decode to render: ms a batch on the host, one after another; thread: ms a batch in the inference thread",
    "wall: ms a batch in all; hidden: the sum of the steps less wall; gap: wall less thread",
    "overlaps: what goes on while the device works; queue: claim and settle, where the gap is under a tenth",
)


def _figures(row: Mapping[str, Any]) -> list[str]:
    return [value if isinstance(value := row[key], str) else _number(value) for key in COLUMNS]


def _number(value: float) -> str:
    """Return a number with three digits that count."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Yield rows as lines; the first ``left`` columns are aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    # A long reason must not push the other rows' seconds out of sight.
    widths = [min(width, 84) for width in widths]
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
