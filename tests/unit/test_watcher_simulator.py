# SPDX-License-Identifier: Apache-2.0
"""The simulator: its model of workers, the policy in it, and its command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest
from click.testing import CliRunner

from gpuinfer.cli import cli
from gpuinfer.errors import InputError
from gpuinfer.watcher.simulator.cluster import Cluster, Model
from gpuinfer.watcher.simulator.events import Event, parse
from gpuinfer.watcher.simulator.policy import Policy
from gpuinfer.watcher.simulator.run import Scenario, play, quantile
from gpuinfer.watcher.simulator.traces import PATTERNS, Trace, read
from tests.bench.scalers.players import Tutorial
from tests.bench.scalers.suite import scenario

pytestmark = pytest.mark.unit

ONE_BY_ONE = Model(startup_s=10.0, startup_spread=0.0, single_s=1.0, max_batch=1, gain=1.0)


def at_once(tasks: int, second: int = 100, step_s: float = 0.1, seconds: float = 900.0) -> Trace:
    """Return a trace of one burst."""
    when = np.array([round(second / step_s)])
    return Trace("at once", seconds, step_s, {"default": (when, np.array([tasks]))})


def world(tasks: int, gpus: int = 8, floor: int = 1, model: Model = ONE_BY_ONE) -> Scenario:
    return Scenario(name="test", trace=at_once(tasks), gpus=gpus, floor=floor, model=model)


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
    cluster.stop(0)
    assert (cluster.running, cluster.leaving) == (0, 1)
    cluster.move_to(10)
    assert (cluster.done, cluster.leaving, cluster.idle) == ([0, 1, 0], 0, 0)


def test_quantiles_are_of_tasks() -> None:
    """99 tasks that did not wait, and one that did."""
    assert quantile(Counter({0: 99, 70: 1}), 0.99) == 0
    assert quantile(Counter({0: 98, 70: 2}), 0.99) == 70


# -- ours, in comparison ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_outcome() -> None:
    """The figures in the documentation can be reproduced."""
    made = [scenario("burst", seconds=600) for _ in range(2)]
    assert play(made[0], Policy(made[0].settings)) == play(made[1], Policy(made[1].settings))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_tasks_of_every_pattern_are_served(pattern: str) -> None:
    """Nothing is left at the end, whatever the pattern."""
    one = scenario(pattern, seconds=900, floor=1)  # type: ignore[arg-type]  # it is a pattern
    assert play(one, Policy(one.settings)).unserved == 0


def test_a_thousand_gpus_are_simulated() -> None:
    """The same policy, the same code, in one process."""
    one = scenario("flash", gpus=1000, seconds=30, floor=100, load=0.2)
    outcome = play(one, Policy(one.settings.model_copy(update={"floor": 100})))
    assert outcome.most > 200
    assert outcome.unserved == 0


def test_a_worker_that_fails_is_excluded_and_comes_back() -> None:
    """It fails while it serves and at each start; another one is started meanwhile."""
    one = world(1400, gpus=2, floor=0)
    policy = Policy(one.settings, events=[Event(130.0, "fail", 0), Event(400.0, "recover", 0)])
    outcome = play(one, policy)
    running = {round(at): active + starting for at, _, active, starting in outcome.probes}
    assert (running[125], running[133], outcome.unserved) == (2, 1, 0)
    assert (running[400], running[650]) == (1, 2)
    assert policy.history.units == {key: unit for key, unit in policy.history.units.items() if not unit.hold}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([Event(200.0, "stop", 0)], (2, 1, 1)),
        ([Event(200.0, "stop", 0), Event(500.0, "start", 0)], (2, 1, 2)),
        ([Event(50.0, "mask", 1), Event(500.0, "unmask", 1)], (1, 1, 2)),
    ],
)
def test_what_is_done_by_hand_holds(events: list[Event], expected: tuple[int, int, int]) -> None:
    """A stop until a start, a mask until it is taken away: workers at 150, 450 and 550 s."""
    one = world(5000, gpus=2, floor=0)
    probes = play(one, Policy(one.settings, events=events)).probes
    running = {round(at): active + starting for at, _, active, starting in probes}
    assert (running[150], running[450], running[550]) == expected


@pytest.mark.parametrize(
    "text", ["", "5:fail", "x:fail:0", "-1:fail:0", "5:melt:0", "5:fail:8", "nan:fail:0"]
)
def test_what_is_no_event_is_refused(text: str) -> None:
    """With what would be one."""
    with pytest.raises(InputError, match="SECOND:WHAT:GPU"):
        parse(text, 8)


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


def test_the_command_answers_in_json() -> None:
    """Both modes of the policy, with what happens to workers."""
    arguments = ["watcher", "simulate", "--pattern", "flash", "--seconds", "300", "--event", "9:fail:0"]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert [one["policy"] for one in orjson.loads(done.stdout)["policies"]] == ["target", "threshold"]
    table = CliRunner().invoke(cli, arguments).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["flash:", "policy", "target", "threshold"]


@pytest.mark.parametrize(
    "arguments", [[], ["--pattern", "burst", "--trace", "a.csv"], ["--pattern", "burst", "--floor", "9"]]
)
def test_a_call_that_cannot_be_meant_is_refused(arguments: list[str]) -> None:
    """One of the two sources, and a floor that fits."""
    assert CliRunner().invoke(cli, ["watcher", "simulate", *arguments]).exit_code == 2
