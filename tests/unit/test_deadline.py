# SPDX-License-Identifier: Apache-2.0
"""Time limits: interrupts strike once, only inside the block, and leave nothing behind."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import pytest

from gpuinfer.errors import InferenceError, SoftTimeLimitExceeded
from gpuinfer.worker.deadline import Deadline

pytestmark = pytest.mark.unit


@pytest.fixture
def hard() -> list[float]:
    return []


@pytest.fixture
def deadline(hard: list[float]) -> Iterator[Deadline]:
    made = Deadline(lambda: hard.append(time.monotonic()))
    yield made
    made.close()


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_in_time(deadline: Deadline, hard: list[float]) -> None:
    """A block that ends in time is left alone, then and later."""
    assert deadline.run(0.3, 0.4, lambda: 7) == 7
    spin(0.6)
    assert not hard


def test_python_is_interrupted(deadline: Deadline) -> None:
    """Python code is interrupted at the soft limit, not when it ends."""
    with pytest.raises(SoftTimeLimitExceeded):
        deadline.run(0.05, 1200, lambda: spin(600))  # pytest's own limit is shorter


def test_native_code_is_found_out(deadline: Deadline) -> None:
    """Code that cannot be interrupted counts as too long when it returns."""
    with pytest.raises(SoftTimeLimitExceeded):
        deadline.run(0.02, 60, lambda: time.sleep(0.1))


def test_an_error_in_time_stays_itself(deadline: Deadline) -> None:
    """What the block raises before its limit comes out unchanged."""

    def breaks() -> None:
        raise InferenceError("broken")

    with pytest.raises(InferenceError, match="broken"):
        deadline.run(60, 120, breaks)


def test_code_that_catches_everything(deadline: Deadline) -> None:
    """A block that swallows exceptions does not swallow the limit."""

    def swallows() -> None:
        with contextlib.suppress(Exception):
            spin(0.2)

    with pytest.raises(SoftTimeLimitExceeded):
        deadline.run(0.03, 60, swallows)


def test_hard_limit_calls_out(deadline: Deadline, hard: list[float]) -> None:
    """At the hard limit the watcher is told to end the process, while the block still runs."""

    def goes_on() -> None:
        with contextlib.suppress(BaseException):  # the interrupt at the soft limit
            spin(5)
        while not hard:  # the machine may be busy; pytest's own limit ends a wait in vain
            time.sleep(0.01)

    with pytest.raises(SoftTimeLimitExceeded):
        deadline.run(0.02, 0.06, goes_on)
    assert len(hard) == 1


def test_at_the_very_limit(deadline: Deadline) -> None:
    """Blocks that end as the limit strikes: each is in time or too long, and none leaks an interrupt."""
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        try:
            deadline.run(0.002, 60, lambda: spin(0.002))
            outcomes[True] += 1
        except SoftTimeLimitExceeded:
            outcomes[False] += 1
    spin(0.05)
    assert sum(outcomes.values()) == 300


def test_under_a_tracer(deadline: Deadline) -> None:
    """An interrupt does not leave the interpreter's eval breaker set, on which a traced thread would hang."""
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        for _ in range(3):
            with pytest.raises(SoftTimeLimitExceeded):
                deadline.run(0.01, 60, lambda: time.sleep(0.05))
            spin(0.001)
    finally:
        sys.settrace(before)
