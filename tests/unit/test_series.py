# SPDX-License-Identifier: Apache-2.0
"""A number in two bytes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuinfer.queue.series import pack, unpack

pytestmark = pytest.mark.unit


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_it_is_right_within_a_fifth_of_a_percent(value: float) -> None:
    """From a microsecond to a billion tasks."""
    (found,) = unpack(pack(value))
    assert found == pytest.approx(value, rel=0.002)


@given(st.integers(min_value=0, max_value=256))
def test_small_counts_are_exact(value: int) -> None:
    """As most queues and fleets have them."""
    assert unpack(pack(value)) == [value]


def test_nothing_is_not_zero() -> None:
    """A gap shows as one."""
    assert unpack(b"\0\0" + pack(0.0)) == [None, 0.0]
    assert unpack(pack(math.nan) + pack(math.inf) + pack(-3.0)) == [None, None, 0.0]
    assert unpack(pack(1e39))[0] == pytest.approx(3e38, rel=0.01)
