# SPDX-License-Identifier: Apache-2.0
"""What a check finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error", "skipped"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "error", "skipped")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    status: Status
    message: str
    #: A command to paste that fixes it or shows more; empty when there is nothing to do.
    remedy: str = ""
    #: Name of the check; the runner fills it in.
    check: str = ""


Findings = Finding | Sequence[Finding]


class Skipped(Exception):
    """Raised when this host does not have what a check looks at."""


def edit(file: object) -> str:
    """Return the command that opens a file: Debian's own name for whichever editor there is."""
    return f"editor {file}"


def ok(message: str) -> Finding:
    """Return a finding that all is well."""
    return Finding("ok", message)


def warning(message: str, remedy: str) -> Finding:
    """Return a finding for what costs something now or will fail one day."""
    return Finding("warning", message, remedy)


def error(message: str, remedy: str) -> Finding:
    """Return a finding that keeps this host from working."""
    return Finding("error", message, remedy)
