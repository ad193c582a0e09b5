# SPDX-License-Identifier: Apache-2.0
"""The watcher's sentence for each state: what is desired, what runs, why, who is excluded and until when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gpuinfer.queue.fleet import EVERYTHING
from gpuinfer.watcher.cooldown import Cooldown
from gpuinfer.watcher.memory import UnitMemory
from gpuinfer.watcher.part import Measured
from gpuinfer.watcher.policy import History, decide
from gpuinfer.watcher.rates import Rates
from gpuinfer.watcher.state import GpuHealth, Instance, Key, UnitState
from tests.watchers import KNOWN, observe, settings

pytestmark = pytest.mark.unit

NOW = 1000.0
QUIET = Cooldown(needs=((NOW - 1, 0),), since=0.0, seen_at=NOW - 1)
IDLE = "nothing waits and nothing arrives"


def kept(number: int, state: UnitState = "inactive", **more: Any) -> tuple[Key, UnitMemory]:
    return Key(number, "a"), UnitMemory(state=state, since=0.0, **more)


def one(number: int, state: UnitState = "inactive", **more: Any) -> Instance:
    return Instance(key=Key(number, "a"), state=state, **{"busy": False, **more})


@dataclass
class Case:
    """Instances, what is remembered of them, and what waits."""

    instances: list[Instance]
    units: Mapping[Key, UnitMemory] = field(default_factory=dict)
    waiting: int = 0
    in_flight: int = 0
    settings: dict[str, object] = field(default_factory=dict)
    cooldown: Cooldown = QUIET
    rates: Rates = KNOWN

    def why(self) -> str:
        parts = {str(EVERYTHING): Measured(rates=self.rates, cooldown=self.cooldown)}
        seen = observe(self.instances, waiting=self.waiting, in_flight=self.in_flight)
        history = History(parts=parts, units=self.units)
        return decide(seen, history, settings(**self.settings), NOW).why


def excluded(words: str) -> str:
    return f"no worker is desired, none runs: {IDLE}; excluded: gpu0@a ({words})"


TABLE: list[tuple[str, Case, str]] = [
    ("nothing to do", Case([one(0), one(1)]), f"no worker is desired, none runs: {IDLE}"),
    (
        "the floor",
        Case([one(0), one(1)], settings={"floor": 1}),
        f"1 worker is desired, none runs: {IDLE}, and the floor is 1; starting gpu0@a",
    ),
    (
        "a backlog",
        Case([one(0), one(1, "active", busy=True), one(2)], waiting=300),
        "4 workers are desired, 1 runs: 300 tasks wait in default, 3 more can serve them within 15 s "
        "at 10/s each; starting gpu0@a, gpu2@a; no other instance can be started",
    ),
    (
        "a backlog, and no instance is left",
        Case([one(0, "active", busy=True)], waiting=1000),
        "18 workers are desired, 1 runs: 1,000 tasks wait in default, 17 more can serve them within 15 s "
        "at 10/s each; no other instance can be started",
    ),
    (
        "a backlog that is met",
        Case([one(0, "active", busy=True), one(1)], waiting=100),
        "1 worker is desired, 1 runs: 100 tasks wait in default, and those that run serve them within 15 s",
    ),
    (
        "the ceiling",
        Case([one(0), one(1), one(2)], waiting=1000, settings={"ceiling": 1}),
        "1 worker is desired, none runs: 1,000 tasks wait in default, 20 more can serve them within "
        "15 s at 10/s each, and the ceiling leaves 1; starting gpu0@a",
    ),
    (
        "threshold mode",
        Case([one(0), one(1)], waiting=51, settings={"mode": "threshold"}),
        "1 worker is desired, none runs: 51 tasks wait, more than the threshold of 50; starting gpu0@a",
    ),
    (
        "it is enabled, and starts",
        Case([one(0, enabled=True)]),
        f"1 worker is desired, none runs: {IDLE}, and 1 enabled; starting gpu0@a",
    ),
    (
        "it is enabled, and runs",
        Case([one(0, "active", enabled=True), one(1)]),
        f"1 worker is desired, 1 runs: {IDLE}, and 1 enabled",
    ),
    (
        "one too many, which is enough for the cooldown only later",
        Case([one(0, "active")], cooldown=replace(QUIET, since=NOW - 5)),
        f"no worker is desired, 1 runs: {IDLE}; one is stopped when that has been so for 60 s and it is idle",
    ),
    (
        "one too many",
        Case([one(0, "active", enabled=True), one(1, "active")]),
        f"1 worker is desired, 2 run: {IDLE}, and 1 enabled; stopping gpu1@a, not needed for 60 s",
    ),
    (
        "it was started by hand",
        Case([one(0, "active")], dict([kept(0, "active", hold="started", hold_until=NOW + 60)])),
        f"no worker is desired, 1 runs: {IDLE}; gpu0@a was started by hand",
    ),
    (
        "its starts keep failing",
        Case(
            [one(0, "activating", restarts=2)],
            dict([kept(0, "activating", restarts=1, failed_starts=1)]),
        ),
        f"no worker is desired, none runs: {IDLE}; stopping gpu0@a, whose starts keep failing; "
        "excluded: gpu0@a "
        "(in quarantine for 30 s more: its starts fail, and systemd starts it again and again)",
    ),
    (
        "enabled, and in quarantine",
        Case(
            [one(0, "failed", enabled=True)],
            dict(
                [
                    kept(
                        0,
                        "failed",
                        enabled=True,
                        failures=3,
                        quarantined_until=NOW + 120,
                        why="its unit failed",
                    )
                ]
            ),
        ),
        excluded("in quarantine for 120 s more after 3 failures: its unit failed"),
    ),
    ("masked", Case([one(0, masked=True)]), excluded("masked, until it is unmasked")),
    (
        "stopped by hand",
        Case([one(0)], dict([kept(0, hold="stopped")])),
        excluded("stopped by hand, until it is started or enabled, or the host boots"),
    ),
    (
        "disabled by hand",
        Case([one(0)], dict([kept(0, hold="disabled")])),
        excluded("disabled by hand, until it is started or enabled, or the host boots"),
    ),
    (
        "drained",
        Case([one(0, "active", drained=True)]),
        excluded("drained, until gpuinfer worker resume 0"),
    ),
    (
        "NVML has not answered",
        Case([one(0, gpu=GpuHealth(unknown="its GPU's driver has not answered NVML yet"))]),
        excluded("its GPU's driver has not answered NVML yet, until it does"),
    ),
    (
        "a fault",
        Case([one(0, gpu=GpuHealth(fault="Xid 79"))]),
        excluded("in quarantine for 30 s more: its GPU is not healthy (Xid 79)"),
    ),
    (
        "heat",
        Case([one(0, gpu=GpuHealth(hot="it has 93 degrees C and slows down at 92"))]),
        excluded("its GPU is too hot: it has 93 degrees C and slows down at 92, until that has passed"),
    ),
    (
        "other programs",
        Case([one(0, gpu=GpuHealth(foreign_bytes=3 * 2**30))]),
        excluded("other programs hold 3072 MiB of its GPU, until they hold 1024 MiB at most"),
    ),
    (
        "several for the same reason",
        Case([one(0, masked=True), one(1), one(2, masked=True)], waiting=200),
        "4 workers are desired, none runs: 200 tasks wait in default, 4 more can serve them within 15 s "
        "at 10/s each; starting gpu1@a; no other instance can be started; "
        "excluded: gpu0@a, gpu2@a (masked, until it is unmasked)",
    ),
    (
        "tasks in flight alone",
        Case([one(0, "active", busy=True)], in_flight=3),
        "1 worker is desired, 1 runs: nothing waits; 3 in flight",
    ),
]


@pytest.mark.parametrize(("case", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_each_state_has_its_sentence(case: Case, words: str) -> None:
    """All of them, for the eye of whoever changes a word."""
    assert case.why() == words


def test_no_redis_is_said_with_its_reason() -> None:
    """Nothing is decided then."""
    seen = replace(observe([one(0)]), queues=None, trouble="connection refused")
    why = decide(seen, History(), settings(), NOW).why
    assert why == "Redis cannot be read, so nothing changes: connection refused"
