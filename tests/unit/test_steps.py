# SPDX-License-Identifier: Apache-2.0
"""Running totals as rates of whole steps: nothing is lost, and an even load looks even."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuinfer.metrics.steps import MOST_GAP_S, Steps, state
from gpuinfer.queue.series import FINE

pytestmark = pytest.mark.unit


@given(st.lists(st.tuples(st.floats(0.1, MOST_GAP_S - 1), st.integers(0, 10**6)), min_size=1, max_size=30))
def test_the_sum_is_what_was_counted(looks: list[tuple[float, int]]) -> None:
    """But for what lies in the step that is not over, and a fifth of a percent of one step."""
    steps, at, total, found = Steps(at=1000.0), 1000.0, 0, [0.0]
    for seconds, count in looks:
        at, total = at + seconds, total + count
        over = steps.add(at, {"ended": total})
        found += [rates["ended"] * FINE.step_s for rates in over.values()]
        steps = Steps.of(dict(state(steps)))
    most = 0.0021 * max(found) + 1e-6
    assert sum(found) + steps.open.get("ended", 0.0) == pytest.approx(total, abs=most)


def test_an_even_load_looks_even_however_late_the_looks_are() -> None:
    """A look that is two seconds late is no burst, and one that is missed no gap."""
    steps, rates = Steps(at=1000.0, totals={"ended": 0}), []
    for at in (1010.2, 1022.0, 1030.1, 1059.0, 1060.5):
        rates += [one["ended"] for one in steps.add(at, {"ended": round(40 * (at - 1000))}).values()]
    assert rates == pytest.approx([40] * 6, rel=0.01)


def test_a_redis_that_came_back_empty_counts_anew() -> None:
    """What it has counted since then is what there is."""
    steps = Steps(at=1000.0, totals={"ended": 500})
    assert steps.add(1010.0, {"ended": 20}) == {1000: {"ended": 2.0}}
    assert steps.add(1010.0 + 2 * MOST_GAP_S, {"ended": 900}) == {}  # nobody has looked for long
    assert Steps.of({"no": "such"}) == Steps.of(None) == Steps()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"at": "now"}, {"at": None}, {"at": float("nan")}),
        *({"totals": []}, {"totals": {"ended": "7"}}, {"open": 5}, {"owed": {"ended": None}}),
    ],
    ids=str,
)
def test_a_state_of_other_types_is_none(wrong: dict[str, Any]) -> None:
    """Somebody else has written it; it is counted anew."""
    steps = Steps.of({"at": 1000.0, "totals": {"ended": 5}, **wrong})
    assert steps == Steps()
    assert steps.add(1010.0, {"ended": 20}) == {}
