# SPDX-License-Identifier: Apache-2.0
"""Counts in sentences."""

from __future__ import annotations

import pytest

from gpuinfer.plural import many, tasks_wait

pytestmark = pytest.mark.unit


def test_one_is_no_plural() -> None:
    """Nor is it without a number, and thousands are readable."""
    assert [many(count, "time") for count in (0, 1, 1200)] == ["0 times", "1 time", "1,200 times"]
    assert [tasks_wait(count) for count in (1, 2)] == ["1 task waits", "2 tasks wait"]
