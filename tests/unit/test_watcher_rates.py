# SPDX-License-Identifier: Apache-2.0
"""What is measured: arrivals, what a worker serves, and what is not believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuinfer.watcher.load import Load, load_of
from gpuinfer.watcher.rates import Rates, measure
from gpuinfer.watcher.state import Observation
from tests.watchers import observe, settings

pytestmark = pytest.mark.unit


def load(seen: Observation) -> Load:
    """Return all that is seen as one demand."""
    return load_of(seen.queues or (), seen.queues or {}, frozenset(), seen.held)


def looked(
    looks: list[tuple[int, int, int]],
    active: int = 2,
    all_busy: bool = True,
    before: Rates | None = None,
    begin: float = 1000.0,
) -> Rates:
    """Measure one look a second: waiting, in flight, done."""
    rates = before or Rates()
    for second, (waiting, in_flight, done) in enumerate(looks):
        seen = observe(waiting=waiting, in_flight=in_flight, done=done)
        rates = measure(rates, load(seen), active, all_busy, settings(), begin + second)
    return rates


def test_the_service_rate_is_measured_in_saturation() -> None:
    """Two workers that do 40 a second with full batches and a backlog: 20 a second each."""
    rates = looked([(5000 - 40 * second, 64, 40 * second) for second in range(100)])
    assert rates.known
    assert rates.service(settings()) == pytest.approx(20, rel=0.01)


def test_a_throughput_below_saturation_teaches_no_rate() -> None:
    """An idle fleet's throughput is the load's, not the workers'."""
    rates = looked([(0, 2, 3 * second) for second in range(100)], all_busy=False)
    assert not rates.known
    assert rates.service(settings()) == settings().assumed_rate


def test_a_higher_throughput_is_believed() -> None:
    """Who does 30 a second can do 30 a second."""
    rates = looked([(0, 2, 60 * second) for second in range(100)], all_busy=False)
    assert rates.service(settings()) == pytest.approx(30)


def test_a_model_with_smaller_batches_is_learned_after_one_with_large_ones() -> None:
    """What a full worker holds is forgotten with the window; else no backlog would be one again."""
    large = looked([(90_000 - 512 * second, 512, 512 * second) for second in range(60)])
    assert large.service(settings()) == pytest.approx(256, rel=0.01)
    done = 512 * 59
    small = [(3000 - 2 * second, 16, done + 2 * second) for second in range(400)]
    assert looked(small, before=large, begin=1060.0).service(settings()) == pytest.approx(1, rel=0.1)


def test_what_a_worker_that_is_gone_still_holds_makes_no_full_batch() -> None:
    """A dead host's tasks stay in flight for a while; those who serve hold no more for that."""
    seen = replace(load(observe(waiting=100, in_flight=60)), held=4)
    rates = measure(Rates(), seen, 2, True, settings(), 1000.0)
    assert measure(rates, seen, 2, True, settings(), 1001.0).peak == 2


def test_a_throughput_that_was_not_held_is_not_believed() -> None:
    """Nine looks of the same workers: neither idle ones nor those at which one more became ready."""
    idle = [(100, 0, 0)] * 8
    burst = [(90, 8, 0), (62, 8, 30), (60, 8, 32), (58, 8, 34)]
    rates = looked(idle, active=0)
    for second, (waiting, in_flight, done) in enumerate(burst):
        seen = observe(waiting=waiting, in_flight=in_flight, done=done)
        active = 1 if second < 2 else 2
        rates = measure(rates, load(seen), active, False, settings(), 1008.0 + second)
    assert rates.service(settings()) == settings().assumed_rate


def test_arrivals_are_what_waits_and_what_was_served() -> None:
    """Seven a second arrive, whether they wait or are done."""
    rates = looked([(4 * second, 0, 3 * second) for second in range(100)])
    assert rates.steady == pytest.approx(7)
    assert rates.recent == pytest.approx((0, 7, 0))


def test_one_burst_is_no_rate() -> None:
    """A thousand at once are a backlog; they do not arrive every second."""
    rates = looked([(0, 0, 0)] * 20 + [(1000, 0, 0)] * 3)
    assert rates.recent == (0, 0, 0)


def test_a_burst_after_a_gap_is_no_rate_either() -> None:
    """With one look since Redis was away, the burst is all that was seen; it does not arrive every second."""
    assert looked([(0, 0, 0), (0, 0, 0), (1000, 0, 0)]).recent == (0, 0, 0)


def test_a_crowd_is_a_rate_and_rises_as_much_again() -> None:
    """Saturated, and more at each of the last four looks: what comes next is more still."""
    served = [(3000 + 300 * n, 64, 40 * n) for n in range(20)]
    rising = [(9000, 64, 800), (9500, 64, 840), (10_200, 64, 880), (11_200, 64, 920)]
    assert looked([*served, *rising]).recent[1] == pytest.approx(2 * 1040 - 340, rel=0.01)


def test_a_gap_measures_nothing() -> None:
    """After Redis was away, what happened meanwhile is nobody's rate."""
    rates = looked([(0, 0, second) for second in range(10)])
    late = measure(rates, load(observe(done=100_000)), 2, True, settings(), 5000.0)
    assert late.samples == rates.samples
    assert replace(late, at=rates.at, done=rates.done, totals=rates.totals) == rates
