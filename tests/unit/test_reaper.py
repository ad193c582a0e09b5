# SPDX-License-Identifier: Apache-2.0
"""What the reaper decides, from plain values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuinfer.watcher.reaper import WITNESS_S, Facts, judge

pytestmark = pytest.mark.unit

#: A unit of this host that is down, and a worker of a host that is gone.
DOWN = Facts(silent_s=11, watched_s=11, host="here", unit="failed")
GONE = Facts(silent_s=121, watched_s=61, host="old")


@pytest.mark.parametrize("unit", ["inactive", "failed"])
def test_a_unit_that_is_down(unit: str) -> None:
    """Its unit down, its lock free, its heartbeat old, and seen to be: put back, whatever the setting."""
    verdict = judge(replace(DOWN, unit=unit), 0)  # type: ignore[arg-type]  # a state
    assert verdict.reap
    assert verdict.why == f"its unit is {unit}, its lock is free, and nothing was heard of it for 11 s"


@pytest.mark.parametrize(
    "but",
    [
        {"silent_s": 9},
        {"lock": "held"},
        {"lock": "unknown"},
        {"watched_s": 9},
        {"unit": "active"},
        {"unit": "activating"},
        {"unit": "deactivating"},
    ],
)
def test_a_unit_that_may_live(but: dict[str, object]) -> None:
    """One sign of life is enough."""
    assert not judge(replace(DOWN, **but), 120).reap  # type: ignore[arg-type]


def test_another_host_of_its_name() -> None:
    """Or this one before its boot: its unit here tells nothing of it, and it has the time of any host."""
    twin = replace(DOWN, own=False)
    assert judge(DOWN, 120).reap
    assert not judge(replace(twin, silent_s=119, watched_s=119), 120).reap
    assert not judge(replace(twin, silent_s=121, watched_s=WITNESS_S - 1), 120).reap
    assert judge(replace(twin, silent_s=121, watched_s=WITNESS_S), 120).reap
    assert judge(replace(twin, silent_s=WITNESS_S, watched_s=WITNESS_S), 0).reap


def test_a_host_that_is_gone() -> None:
    """Silent for as long as is set, by Redis's clock, and for a while as this reaper itself has seen it."""
    verdict = judge(GONE, 120)
    assert verdict.reap
    assert verdict.why == "nothing was heard of it for 2 min, nor of a watcher of old"


@pytest.mark.parametrize(
    "but",
    [{"silent_s": 119}, {"watched_s": WITNESS_S - 1}, {"watcher_alive": True}, {"lock": "held"}],
)
def test_a_host_that_may_live(but: dict[str, object]) -> None:
    """Not silent for long enough; only just seen, as after Redis was away; looked after by a watcher."""
    assert not judge(replace(GONE, **but), 120).reap  # type: ignore[arg-type]


def test_off() -> None:
    """0: another host's tasks stay where they are, however long it was silent."""
    verdict = judge(replace(GONE, silent_s=1e6, watched_s=1e6), 0)
    assert (verdict.reap, verdict.why) == (False, "watcher.reap_after_s is 0")


def test_a_short_time() -> None:
    """The reaper need not have watched for longer than is set."""
    assert judge(replace(GONE, silent_s=15, watched_s=10), 10).reap
    assert not judge(replace(GONE, silent_s=15, watched_s=9), 10).reap
