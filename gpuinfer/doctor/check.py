# SPDX-License-Identifier: Apache-2.0
"""What a check is, and how checks are run: all at once, each with its limit."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Thread

from gpuinfer.doctor import nvml
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped, error

#: How long a check may take, unless it says otherwise: most of those of GPUs wait for NVML.
LIMIT_S = nvml.LIMIT_S + 5.0


@dataclass(frozen=True)
class Check:
    """One test of a host. The first line of its docstring says what holds on a sound host."""

    #: topic.name; the topic alone chooses all of its checks.
    name: str
    run: Callable[[Host], Findings]
    limit_s: float = LIMIT_S
    #: Takes seconds: left out by --quick.
    slow: bool = False

    @property
    def help(self) -> str:
        return (inspect.getdoc(self.run) or "").partition("\n")[0]


def run_all(checks: Sequence[Check], host: Host) -> Iterator[list[Finding]]:
    """Yield each check's findings, in the checks' order.

    The threads are daemons: one that hangs in the kernel is left behind.
    """
    started = time.monotonic()
    answers = [_start(check, host) for check in checks]
    for check, answer in zip(checks, answers, strict=True):
        try:
            yield answer.get(timeout=max(0.0, started + check.limit_s - time.monotonic()))
        except Empty:
            late = error(f"gave no answer in {check.limit_s:g} s", f"gpuinfer doctor {check.name}")
            yield [replace(late, check=check.name)]


def _start(check: Check, host: Host) -> SimpleQueue[list[Finding]]:
    answer: SimpleQueue[list[Finding]] = SimpleQueue()
    Thread(target=lambda: answer.put(run_one(check, host)), name=check.name, daemon=True).start()
    return answer


def run_one(check: Check, host: Host) -> list[Finding]:
    """Run one check here and now; whatever it does, it ends as findings."""
    try:
        found = check.run(host)
    except Skipped as exc:
        found = Finding("skipped", str(exc))
    except Exception as exc:  # a check that breaks is a finding like any other
        text = f"the check itself failed: {type(exc).__name__}: {' '.join(str(exc).split())}"
        found = error(text, f"gpuinfer doctor {check.name}")
    return [replace(one, check=check.name) for one in ([found] if isinstance(found, Finding) else found)]
