# SPDX-License-Identifier: Apache-2.0
"""The most memory a worker may hold: what counts, what is said, and how its unit takes its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpuinfer.errors import ConfigError
from gpuinfer.watcher import process_units
from gpuinfer.worker.ceiling import EX_GROWN, EX_HARD_LIMIT, Ceiling, resident_bytes

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


def test_what_counts_is_what_is_held_now() -> None:
    """Memory that was given back is no growth, as the peak would say."""
    before = resident_bytes()
    held = np.ones(64 * MIB, np.uint8)
    grown = resident_bytes()
    del held
    assert grown - before > 60 * MIB
    assert resident_bytes() - before < 32 * MIB


def test_a_worker_that_never_could_keep_below_does_not_start() -> None:
    """It would be started anew for ever; the error names the key and how much it holds."""
    ceiling = Ceiling(100, "gpu0@here", lambda: 101 * MIB)
    with pytest.raises(ConfigError, match=r"worker.max_memory_mb.*101 MiB with its models loaded"):
        ceiling.check_loaded()
    Ceiling(101, "gpu0@here", lambda: 101 * MIB).check_loaded()
    Ceiling(0, "gpu0@here", lambda: 101 * MIB).check_loaded()


def test_growth_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Once past the limit, with both figures."""
    held = [99 * MIB, 102 * MIB]
    ceiling = Ceiling(100, "gpu0@here", lambda: held.pop(0))
    assert not ceiling.passed()
    assert ceiling.passed()


def test_its_unit_starts_it_anew_and_calls_it_no_failure() -> None:
    """By the same number everywhere: the worker, its unit, and the watcher's own processes."""
    unit = (Path(__file__).parents[2] / "systemd/gpuinfer-worker@.service").read_text(encoding="utf-8")
    assert f"\nSuccessExitStatus={EX_GROWN}\nRestartForceExitStatus={EX_GROWN} {EX_HARD_LIMIT}\n" in unit
    assert f"in {EX_GROWN}|{EX_HARD_LIMIT}) systemctl reset-failed %n;;" in unit
    assert process_units.RESTARTED == (EX_GROWN, EX_HARD_LIMIT)
