# SPDX-License-Identifier: Apache-2.0
"""The simulator: its model of workers, the others' formulas, and how ours compares."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from click.testing import CliRunner

from gpuinfer.cli import cli
from gpuinfer.errors import InputError
from gpuinfer.watcher.simulator import run
from gpuinfer.watcher.simulator.cluster import Cluster, Model
from gpuinfer.watcher.simulator.players import Hpa, Keda, Ours, Player, Tutorial
from gpuinfer.watcher.simulator.report import Comparison, comparison, markdown, medians
from gpuinfer.watcher.simulator.run import Scenario, compare, play, players, quantile
from gpuinfer.watcher.simulator.suite import QUICK, scenario, suite
from gpuinfer.watcher.simulator.traces import PATTERNS, Trace, read

pytestmark = pytest.mark.unit

ONE_BY_ONE = Model(startup_s=10.0, startup_spread=0.0, single_s=1.0, max_batch=1, gain=1.0)


def at_once(tasks: int, second: int = 100, step_s: float = 0.1, seconds: float = 900.0) -> Trace:
    """Return a trace of one burst."""
    when = np.array([round(second / step_s)])
    return Trace("at once", seconds, step_s, {"default": (when, np.array([tasks]))})


def world(tasks: int, gpus: int = 8, floor: int = 1, model: Model = ONE_BY_ONE) -> Scenario:
    return Scenario(name="test", trace=at_once(tasks), gpus=gpus, floor=floor, model=model)


def workers_at(second: float, player: Player, given: Scenario) -> int:
    """Return how many ran just after a look at that second."""
    looks = play(given, player).looks
    return max((active + starting for at, _, active, starting in looks if at <= second), default=0)


# -- the model of workers -------------------------------------------------------------------


def test_a_batch_takes_what_waits() -> None:
    """One worker, batches of 4 in 2 s: ten tasks are done in three batches, and waits are exact."""
    model = Model(startup_s=1.0, startup_spread=0.0, single_s=1.0, max_batch=4, gain=2.0)
    assert model.batch_s(4) == pytest.approx(2.0)
    assert model.rate == pytest.approx(2.0)
    outcome = play(world(10, gpus=1, model=model), Tutorial(1, 1))
    assert [outcome.p50_s, outcome.p99_s] == pytest.approx([2.0, 4.0])
    assert outcome.unserved == 0


def test_gpu_seconds_count_from_start_to_stop() -> None:
    """Two GPUs all the time are twice the time."""
    outcome = play(world(0 + 1, floor=2), Tutorial(2, 2))
    assert outcome.gpu_s == pytest.approx(2 * 900.0)


def test_gpu_seconds_count_until_the_last_task_is_done_and_no_longer() -> None:
    """Who never stops a worker is not charged for a time in which nothing was asked for; nor is another."""
    late = Scenario(name="late", trace=at_once(100, second=890), gpus=1, floor=1, model=ONE_BY_ONE)
    outcome = play(late, Tutorial(1, 1))
    assert outcome.unserved == 0
    assert outcome.gpu_s == pytest.approx(990.0, abs=1.0)


def test_a_start_that_is_stopped_and_begun_again_is_ready_when_the_second_is() -> None:
    """The moment at which the first one would have been ready passes."""
    cluster = Cluster(1, ONE_BY_ONE, 0.1, seed=1)
    cluster.start(0)
    cluster.move_to(50)
    cluster.stop(0)
    cluster.start(0)
    cluster.move_to(100)
    assert cluster.active == {}
    cluster.move_to(150)
    assert cluster.active == {0: 150}


def test_urgent_queues_go_first() -> None:
    """The realtime task is served before the batch tasks that came with it."""
    cluster = Cluster(1, ONE_BY_ONE, 0.1, seed=1)
    cluster.active[0], cluster.idle = 0, 1
    cluster.arrive(2, 5)
    cluster.arrive(0, 1)
    cluster.claim()
    assert (cluster.waiting, cluster.in_flight) == ([0, 0, 5], [1, 0, 0])


def test_a_stopped_busy_worker_finishes_its_batch() -> None:
    """No player loses work by scaling down."""
    cluster = Cluster(1, ONE_BY_ONE, 0.1, seed=1)
    cluster.active[0], cluster.idle = 0, 1
    cluster.arrive(1, 1)
    cluster.claim()
    cluster.scale_to(0)
    assert (cluster.running, cluster.leaving) == (0, 1)
    cluster.move_to(10)
    assert (cluster.done, cluster.leaving, cluster.idle) == ([0, 1, 0], 0, 0)


def test_quantiles_are_of_tasks() -> None:
    """99 tasks that did not wait, and one that did."""
    assert quantile(Counter({0: 99, 70: 1}), 0.99) == 0
    assert quantile(Counter({0: 98, 70: 2}), 0.99) == 70


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
    looks = {
        round(at): active + starting for at, _, active, starting in play(world(1, floor=0), Keda(0, 8)).looks
    }
    assert (looks[105], looks[120], looks[405], looks[435]) == (0, 1, 1, 0)


def test_keda_keeps_the_most_of_five_minutes() -> None:
    """Scale-down stabilisation 300 s."""
    looks = {round(at): active + starting for at, _, active, starting in play(world(100), Keda(1, 8)).looks}
    assert looks[390] == 8
    assert looks[525] == 1


def test_the_hpa_aims_at_eighty_percent() -> None:
    """One busy worker makes two, two busy ones make three."""
    assert workers_at(120, Hpa(1, 8), world(1000)) == 2
    assert workers_at(150, Hpa(1, 8), world(1000)) == 3


# -- ours, in comparison ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_outcome() -> None:
    """What the README shows, anybody can make again."""
    made = [
        play(one, players(one)[0]) for one in (scenario("burst", seconds=600), scenario("burst", seconds=600))
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_tasks_of_every_pattern_are_served(pattern: str) -> None:
    """Nothing is left at the end, whatever the pattern."""
    one = scenario(pattern, seconds=900, floor=1)  # type: ignore[arg-type]  # it is a pattern
    assert play(one, Ours(one.settings)).unserved == 0


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
    assert made.ours.gpu_s < next(peer for peer in made.peers if peer.player == verdict.best).gpu_s


def test_ten_thousand_gpus_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same policy, the same code, in one process."""
    monkeypatch.setattr(run, "TAIL_S", 30.0)
    one = scenario("flash", gpus=10_000, seconds=30, floor=100, load=0.2)
    outcome = play(one, Ours(one.settings.model_copy(update={"floor": 100})))
    assert outcome.most > 1000
    assert outcome.unserved == 0


def test_the_bound_is_below_everybody() -> None:
    """Starting everything at once waits least."""
    made: Comparison = comparison(one := scenario("burst", seconds=900, model=QUICK), compare(one))
    assert all(made.bound.p99_s <= outcome.p99_s + 1.0 for outcome in made.outcomes)


# -- the command ------------------------------------------------------------------------------


def test_a_trace_is_read_from_a_file(tmp_path: Path) -> None:
    """second,tasks[,queue], a heading and comments are fine; lines of one second are added up."""
    file = tmp_path / "mine.csv"
    file.write_text("second,tasks,queue\n# night\n0,3\n0,2\n7.5,1,realtime\n")
    trace = read(file, 0.5)
    assert trace.tasks == 6
    assert {
        queue: (steps.tolist(), counts.tolist()) for queue, (steps, counts) in trace.arrivals.items()
    } == {
        "default": ([0], [5]),
        "realtime": ([15], [1]),
    }


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("\ufeff1,2\n2,3\n", 5), ("# made by hand\n\nsecond,tasks\n1,2\n", 2), (" 1,2\n", 2)],
)
def test_what_programs_write_before_the_first_line_is_fine(text: str, tasks: int, tmp_path: Path) -> None:
    """A byte order mark; a comment before the heading. No line is dropped for it."""
    file = tmp_path / "mine.csv"
    file.write_text(text, encoding="utf-8")
    assert read(file, 0.5).tasks == tasks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-1,9\n5,1\n", "line 1: second must be 0"),
        ("second,tasks\nsecond,tasks\n", "line 2: 'second,tasks' is not"),
        ("", "holds no arrivals"),
        ("1,2\nx,y\n", "line 2: 'x,y' is not second,tasks[,queue]"),
        ("5\n", "line 1: '5' is not"),
        ("1,2,urgent\n", "queue one of realtime, default, batch"),
        ("1,-2\n", "tasks 0 to 1,000,000,000"),
        ("second,tasks\n0,1,default\nnan,2\n", "line 3"),
        ("nan,1\n", "line 1"),
    ],
)
def test_a_wrong_trace_is_refused_by_line(text: str, words: str, tmp_path: Path) -> None:
    """The file, the line, and what would be right."""
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read(file, 0.1)
    assert words in str(caught.value)


def test_the_command_answers_in_json_and_draws(tmp_path: Path) -> None:
    """Numbers for programs, a PNG for people."""
    picture = tmp_path / "flash.png"
    arguments = [
        "watcher",
        "simulate",
        "--pattern",
        "flash",
        "--seconds",
        "300",
        "--json",
        "--plot",
        str(picture),
    ]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    body = orjson.loads(done.stdout)
    assert [policy["player"] for policy in body["traces"][0]["policies"]] == [
        *("gpuinfer", "tutorial", "keda", "hpa", "bound"),
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_the_table_that_the_command_prints() -> None:
    """The same traces and the same columns; its figures are from one run of it."""
    given = [replace(one, trace=at_once(1)) for one in suite()]
    made = [comparison(one, [play(one, player) for player in players(one)]) for one in given[:1]]
    made = [replace(made[0], scenario=one) for one in given]
    printed = [line for line in markdown(made).splitlines() if line.startswith("|")]
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    begin = readme.index(printed[0])
    shown = readme[begin : begin + len(printed)]
    assert [line.split("|")[1] for line in shown] == [line.split("|")[1] for line in printed]
    assert [line.count("|") for line in shown] == [line.count("|") for line in printed]
    assert not readme[begin + len(printed)].startswith("|")


def test_of_several_seeds_the_medians_count() -> None:
    """Where a burst falls is chance: one lucky trace shows nothing."""
    runs = [
        comparison(one, compare(one))
        for one in (scenario("burst", seconds=300, seed=seed) for seed in (1, 2, 3))
    ]
    made = medians(runs)
    assert made.ours.p99_s == sorted(one.ours.p99_s for one in runs)[1]
    assert made.bound.gpu_s == sorted(one.bound.gpu_s for one in runs)[1]
    assert [one.player for one in made.outcomes] == [one.player for one in runs[0].outcomes]


def test_the_markdown_says_why_not(tmp_path: Path) -> None:
    """Below the table, for each trace that has no 'yes'."""
    one = replace(scenario("poisson", seconds=300), name="short")
    made = comparison(one, compare(one))
    text = markdown([made])
    assert (f"- short: {made.verdict().why}" in text) != made.verdict().met


@pytest.mark.parametrize(
    "arguments", [[], ["--pattern", "burst", "--suite"], ["--pattern", "burst", "--floor", "9"]]
)
def test_a_call_that_cannot_be_meant_is_refused(arguments: list[str]) -> None:
    """One of the three sources, and a floor that fits."""
    assert CliRunner().invoke(cli, ["watcher", "simulate", *arguments]).exit_code == 2


def test_without_matplotlib_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plot is an extra, and the error says how to get it."""
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = [
        "watcher",
        "simulate",
        "--pattern",
        "burst",
        "--seconds",
        "120",
        "--plot",
        str(tmp_path / "a.png"),
    ]
    done = CliRunner().invoke(cli, arguments)
    assert "pip install 'gpuinfer[plot]'" in str(done.exception)
