# SPDX-License-Identifier: Apache-2.0
"""The watcher's policy beside others' formulas, which are those that their documents state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuinfer.watcher.simulator.policy import Player
from gpuinfer.watcher.simulator.run import Scenario, play
from tests.bench.scalers.players import Hpa, Keda, Tutorial, compare, players
from tests.bench.scalers.report import Comparison, comparison, markdown, medians
from tests.bench.scalers.suite import QUICK, scenario, suite
from tests.unit.test_watcher_simulator import at_once, world

pytestmark = pytest.mark.unit


def workers_at(second: float, player: Player, given: Scenario) -> int:
    """Return how many ran just after a look at that second."""
    probes = play(given, player).probes
    return max((active + starting for at, _, active, starting in probes if at <= second), default=0)


# -- the others' formulas, with their defaults ------------------------------------------------


@pytest.mark.parametrize(("second", "workers"), [(100, 2), (110, 3), (120, 4), (600, 4)])
def test_the_tutorial_adds_one_each_ten_seconds_up_to_four(second: int, workers: int) -> None:
    """More than 50 waiting: one more, at most 4, never down."""
    assert workers_at(second, Tutorial(1, 8), world(1000)) == workers


def test_the_tutorial_leaves_fifty_alone() -> None:
    """Fifty are not more than fifty; one of them is in flight at once."""
    assert workers_at(600, Tutorial(1, 8), world(51)) == 1
    assert workers_at(600, Tutorial(1, 8), world(52)) == 2


@pytest.mark.parametrize(("second", "workers"), [(104, 1), (105, 5), (119, 5), (120, 10), (135, 20)])
def test_keda_doubles_or_adds_four_each_fifteen_seconds(second: int, workers: int) -> None:
    """ceil(waiting / 5) through the HPA's default policies."""
    assert workers_at(second, Keda(1, 20), world(5000, gpus=20)) == workers


def test_keda_wakes_at_its_poll_and_sleeps_after_its_cooldown() -> None:
    """From zero at the next 30 s poll; back to zero 300 s after a poll that saw work."""
    probes = {
        round(at): active + starting for at, _, active, starting in play(world(1, floor=0), Keda(0, 8)).probes
    }
    assert (probes[105], probes[120], probes[405], probes[435]) == (0, 1, 1, 0)


def test_keda_keeps_the_most_of_five_minutes() -> None:
    """Scale-down stabilisation 300 s."""
    probes = {round(at): active + starting for at, _, active, starting in play(world(100), Keda(1, 8)).probes}
    assert probes[390] == 8
    assert probes[525] == 1


def test_the_hpa_aims_at_eighty_percent() -> None:
    """One busy worker makes two, two busy ones make three."""
    assert workers_at(120, Hpa(1, 8), world(1000)) == 2
    assert workers_at(150, Hpa(1, 8), world(1000)) == 3


# -- ours, in comparison ---


@pytest.mark.parametrize("name", ["burst, 64 GPUs", "flash, 64 GPUs"])
def test_ours_waits_half_as_long_for_no_more_gpu_seconds(name: str) -> None:
    """On these of the fixed traces it is reached; on the others the report says why not."""
    one = next(given for given in suite() if given.name == name)
    verdict = comparison(one, compare(one)).verdict()
    assert verdict.met, verdict.why


def test_where_it_is_not_reached_the_report_says_why() -> None:
    """The bound shows what nobody could do."""
    one = next(given for given in suite() if given.name == "burst from zero")
    made = comparison(one, compare(one))
    verdict = made.verdict()
    assert not verdict.met
    assert "nobody could reach who does not know the future" in verdict.why
    assert made.bound.p99_s <= made.ours.p99_s < min(peer.p99_s for peer in made.peers)
    assert made.ours.gpu_s < next(peer for peer in made.peers if peer.policy == verdict.best).gpu_s


def test_the_bound_is_below_everybody() -> None:
    """Starting everything at once waits least."""
    made: Comparison = comparison(one := scenario("burst", seconds=900, model=QUICK), compare(one))
    assert all(made.bound.p99_s <= outcome.p99_s + 1.0 for outcome in made.outcomes)


def test_the_documentation_has_the_table_that_the_command_prints() -> None:
    """The same traces and the same columns; its figures are from one run of it."""
    given = [replace(one, trace=at_once(1)) for one in suite()]
    made = [comparison(one, [play(one, player) for player in players(one)]) for one in given[:1]]
    made = [replace(made[0], scenario=one) for one in given]
    printed = [line for line in markdown(made).splitlines() if line.startswith("|")]
    page = (Path(__file__).parents[2] / "packaging/doc/figures.md").read_text(encoding="utf-8").splitlines()
    begin = page.index(printed[0])
    shown = page[begin : begin + len(printed)]
    assert [line.split("|")[1] for line in shown] == [line.split("|")[1] for line in printed]
    assert [line.count("|") for line in shown] == [line.count("|") for line in printed]
    assert not page[begin + len(printed)].startswith("|")


def test_of_several_seeds_the_medians_count() -> None:
    """Where a burst falls is chance: one lucky trace shows nothing."""
    runs = [
        comparison(one, compare(one))
        for one in (scenario("burst", seconds=300, seed=seed) for seed in (1, 2, 3))
    ]
    made = medians(runs)
    assert made.ours.p99_s == sorted(one.ours.p99_s for one in runs)[1]
    assert made.bound.gpu_s == sorted(one.bound.gpu_s for one in runs)[1]
    assert [one.policy for one in made.outcomes] == [one.policy for one in runs[0].outcomes]


def test_the_markdown_says_why_not(tmp_path: Path) -> None:
    """Below the table, for each trace that has no 'yes'."""
    one = replace(scenario("poisson", seconds=300), name="short")
    made = comparison(one, compare(one))
    text = markdown([made])
    assert (f"- short: {made.verdict().why}" in text) != made.verdict().met
