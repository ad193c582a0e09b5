# SPDX-License-Identifier: Apache-2.0
"""The report: one line a finding, its remedy under it; or a document in JSON."""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

import gpuinfer
from gpuinfer.doctor.finding import STATUSES, Finding, Status

_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "error": ("✗", "red"),
    "skipped": ("-", "bright_black"),
}
_PLURALS: dict[Status, str] = {"ok": "ok", "warning": "warnings", "error": "errors", "skipped": "skipped"}


def line(finding: Finding, width: int, *, terminal: bool) -> str:
    """Return a finding for people: marks and colours on a terminal, words elsewhere."""
    mark, colour = _MARKS[finding.status]
    shown = click.style(mark, fg=colour, bold=True) if terminal else f"{finding.status:7}"
    name = f"{finding.check:{width}}"
    text = f"{shown} {click.style(name, dim=True) if terminal else name}  {finding.message}"
    if not finding.remedy:
        return text
    arrow = click.style(f"→ {finding.remedy}", fg="cyan") if terminal else f"-> {finding.remedy}"
    return f"{text}\n{'' if terminal else '        '}  {arrow}"


def summary(findings: Sequence[Finding], took_s: float) -> str:
    """Return the last line."""
    counts = Counter(finding.status for finding in findings)
    parts = [f"{counts[status]} {_word(status, counts[status])}" for status in STATUSES if counts[status]]
    return f"{len(findings)} findings: {', '.join(parts) or 'none'} ({took_s:.1f} s)"


def _word(status: Status, count: int) -> str:
    return status if count == 1 else _PLURALS[status]


def document(findings: Sequence[Finding], took_s: float) -> dict[str, Any]:
    """Return everything for JSON."""
    counts = Counter(finding.status for finding in findings)
    return {
        "ok": not counts["error"],
        "host": socket.gethostname(),
        "version": gpuinfer.__version__,
        "took_s": round(took_s, 3),
        "summary": {status: counts[status] for status in STATUSES},
        "findings": [
            {"check": found.check, "status": found.status, "message": found.message, "remedy": found.remedy}
            for found in findings
        ],
    }


def on_terminal() -> bool:
    """Tell whether a person reads, on a terminal that has our marks."""
    return sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
