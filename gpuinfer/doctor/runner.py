# SPDX-License-Identifier: Apache-2.0
"""Runs all checks at once, each with its limit. Whatever a check does, it ends as findings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Thread

from gpuinfer.doctor.check import Check
from gpuinfer.doctor.finding import Finding, Skipped, error
from gpuinfer.doctor.host import Host


def look_over(checks: Sequence[Check], host: Host) -> Iterator[list[Finding]]:
    """Yield each check's findings, in the checks' order.

    The threads are daemons: one that hangs in the kernel is left behind.
    """
    runs = [_Run(check, host) for check in checks]
    for run in runs:
        run.thread.start()
    for run in runs:
        yield run.result()


@dataclass
class _Run:
    check: Check
    host: Host
    findings: list[Finding] | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.thread = Thread(target=self._work, name=self.check.name, daemon=True)

    def _work(self) -> None:
        self.findings = look(self.check, self.host)

    def result(self) -> list[Finding]:
        """Wait until the check has ended or its limit is over."""
        self.thread.join(max(0.0, self.started + self.check.limit_s - time.monotonic()))
        if self.findings is not None:
            return self.findings
        late = error(f"gave no answer in {self.check.limit_s:g} s", f"gpuinfer doctor {self.check.name}")
        return [replace(late, check=self.check.name)]


def look(check: Check, host: Host) -> list[Finding]:
    """Run one check here and now; whatever it does, it ends as findings."""
    return [replace(found, check=check.name) for found in _call(check, host)]


def _call(check: Check, host: Host) -> Sequence[Finding]:
    try:
        found = check.run(host)
    except Skipped as exc:
        return [Finding("skipped", str(exc))]
    except Exception as exc:  # a check that breaks is a finding like any other
        words = " ".join(str(exc).split())
        return [
            error(f"the check itself failed: {type(exc).__name__}: {words}", f"gpuinfer doctor {check.name}")
        ]
    return [found] if isinstance(found, Finding) else found
