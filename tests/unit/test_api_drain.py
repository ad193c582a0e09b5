# SPDX-License-Identifier: Apache-2.0
"""What Retry-After says when the queue is full."""

from __future__ import annotations

import pytest

from gpuinfer.api.drain import LONGEST_S, WINDOW_S, Drain

pytestmark = pytest.mark.unit


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_the_time_in_which_the_refused_drain() -> None:
    """At 10 tasks a second and 50 refusals, the fiftieth may come back in 5 s."""
    clock = Clock()
    drain = Drain(1, clock)
    drain.sample(1000)
    clock.now += 4
    drain.sample(1040)
    assert drain.rate == 10
    assert [drain.refuse() for _ in range(50)][::10] == [1, 2, 3, 4, 5]
    clock.now += WINDOW_S - 0.1
    drain.sample(1139)
    clock.now += 0.2
    assert drain.refuse() == 1, "refusals of before the window do not count"


def test_without_a_rate_it_is_the_least() -> None:
    """Just started, or Redis was away for long, or emptied: nothing is known."""
    clock = Clock()
    drain = Drain(2, clock)
    assert drain.refuse() == 2
    drain.sample(5)
    assert drain.refuse() == 2
    clock.now += 1
    drain.sample(3)
    assert drain.rate is None
    clock.now += 1
    drain.sample(3)
    assert drain.rate == 0
    clock.now += WINDOW_S + 1
    assert drain.rate is None


def test_where_nothing_drains_it_is_the_longest() -> None:
    """No worker runs: to come back soon is of no use. Nor is any longer time told."""
    clock = Clock()
    drain = Drain(2, clock)
    for left in (7, 7, 8):
        drain.sample(left)
        clock.now += 1
    assert drain.rate == 0.5
    assert [drain.refuse() for _ in range(100)][-1] == LONGEST_S
    still = Drain(2, clock)
    still.sample(7)
    clock.now += 1
    still.sample(7)
    assert still.refuse() == LONGEST_S
