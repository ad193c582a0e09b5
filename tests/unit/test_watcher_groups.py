# SPDX-License-Identifier: Apache-2.0
"""The policy of a fleet whose instances do not all serve the same: capacity counts for what it serves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as some

from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import Server, Serves, remedy
from gpuinfer.settings import QUEUES
from gpuinfer.watcher.load import parts_of
from gpuinfer.watcher.part import Measured
from gpuinfer.watcher.policy import Decision, History
from gpuinfer.watcher.state import Key
from tests.watchers import KNOWN, Mixed, Watcher, settings

pytestmark = pytest.mark.unit

slow = hypothesis(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])

URGENT = Serves(("realtime",), ("a",))
ALL_A = Serves(QUEUES, ("a",))
ALL_B = Serves(QUEUES, ("b",))
BOTH = Serves(QUEUES, ("a", "b"))
REALTIME_A, BATCH_A, DEFAULT_B = Lane("realtime", "a"), Lane("batch", "a"), Lane("default", "b")
LANES = [Lane(tier, model) for tier in QUEUES for model in "ab"]


def some_keys(first: int, count: int, host: str = "h") -> list[Key]:
    return [Key(number, host) for number in range(first, first + count)]


def known(*groups: Serves) -> History:
    """Return a history in which the rates of all parts of a fleet are measured."""
    parts = parts_of(frozenset(groups), frozenset(LANES))
    return History(parts={part.name: Measured(rates=KNOWN) for part in parts})


def fleet(*groups: Serves, each: int = 4, **more: float) -> Mixed:
    """Return a world with this many instances of each group."""
    many = {group: some_keys(place * each, each) for place, group in enumerate(groups)}
    return Mixed.of(many, LANES, **more)


def look(world: Mixed, **changes: object) -> Decision:
    """Let a watcher that knows the rates look once, and act."""
    groups = {one.serves for one in world.instances.values()}
    return Watcher(world, settings(**changes), history=known(*groups)).look()


# -- what a backlog starts ------------------------------------------------------------------


@pytest.mark.parametrize("backlog", [10, 100_000], ids=["small", "more than all can do"])
def test_a_backlog_of_batch_starts_no_worker_for_realtime_alone(backlog: int) -> None:
    """However much waits, and though nothing else is left to start."""
    world = fleet(URGENT, ALL_A)
    world.lanes[BATCH_A] = backlog
    decision = look(world)
    assert world.running(URGENT) == set()
    assert len(world.running(ALL_A)) == (1 if backlog == 10 else 4)
    if backlog > 10:
        assert "100,000 tasks wait in batch" in decision.why


def test_a_backlog_of_one_model_starts_only_who_serves_it() -> None:
    """The other model's workers stay as they are, and say so."""
    world = fleet(ALL_A, ALL_B)
    world.lanes[DEFAULT_B] = 1000
    decision = look(world)
    assert (len(world.running(ALL_A)), len(world.running(ALL_B))) == (0, 4)
    words = "20 workers are desired, none runs: 1,000 tasks wait in default"
    assert decision.why.startswith(f"realtime,default,batch:b: {words}")
    assert decision.inputs["parts"] == (
        "realtime,default,batch:a: 0 waiting, 0 of 4 run, 0 desired, 10/s a worker; "
        "realtime,default,batch:b: 1000 waiting, 0 of 4 run, 20 desired, 10/s a worker"
    )


def test_workers_of_another_model_are_no_capacity() -> None:
    """Eight that idle with model a drain nothing of b's backlog, and none of them is busy with it."""
    world = fleet(ALL_A, ALL_B, each=8)
    world.run_all(ALL_A)
    world.lanes[DEFAULT_B] = 200
    look(world)
    assert len(world.running(ALL_B)) == 4


def test_a_model_whose_workers_are_all_stopped_is_started_from_zero() -> None:
    """One task is enough, beside a busy fleet for another model."""
    world = fleet(ALL_A, ALL_B)
    world.run_all(ALL_A)
    watcher = Watcher(world, settings(cooldown_s=20.0), history=known(ALL_A, ALL_B))
    watcher.run(50, {BATCH_A: 30.0})
    assert world.running(ALL_B) == set()
    world.lanes[DEFAULT_B] = 1
    watcher.run(1, {BATCH_A: 30.0})
    assert world.running(ALL_B) == {Key(4, "h")}
    watcher.run(100, {BATCH_A: 30.0})
    assert (world.lanes[DEFAULT_B], world.running(ALL_B)) == (0, set())


def test_who_serves_the_least_is_started_first() -> None:
    """The others stay free for what they alone serve."""
    world = fleet(ALL_A, URGENT)
    world.lanes[REALTIME_A] = 60
    look(world)
    assert (len(world.running(URGENT)), len(world.running(ALL_A))) == (3, 0)


def test_what_runs_counts_for_all_that_it_serves() -> None:
    """Two that serve everything drain a realtime backlog; no other one is started for it."""
    world = fleet(ALL_A, URGENT, each=2)
    world.run_all(ALL_A)
    world.lanes[REALTIME_A] = 200
    look(world)
    assert world.running(URGENT) == set()


def test_urgent_work_that_holds_up_the_rest_gets_its_own_worker() -> None:
    """Batch work waits for workers that are busy with realtime: those for realtime alone free them."""
    world = fleet(ALL_A, URGENT, each=2)
    world.run_all(ALL_A)
    world.lanes |= {REALTIME_A: 250, BATCH_A: 5000}
    look(world)
    assert world.running(URGENT)


def test_a_worker_for_two_models_helps_both() -> None:
    """It is one part with each model's own workers, and is started when those do not suffice."""
    world = fleet(ALL_A, ALL_B, BOTH, each=2)
    world.lanes[DEFAULT_B] = 150
    look(world)
    assert (len(world.running(ALL_B)), len(world.running(BOTH)), len(world.running(ALL_A))) == (2, 1, 0)


def test_threshold_mode_counts_what_waits_for_whom() -> None:
    """More than N tasks of a model start one more of its own workers."""
    world = fleet(ALL_A, ALL_B, rate=0.0)
    watcher = Watcher(world, settings(mode="threshold"))
    world.lanes |= {DEFAULT_B: 51, BATCH_A: 50}
    watcher.run(5)
    assert world.running() == {Key(4, "h")}


# -- what is stopped ------------------------------------------------------------------------


def test_who_is_not_needed_is_stopped_beside_others_who_are() -> None:
    """The realtime workers idle and go, the last ones first; those with batch work stay."""
    world = fleet(URGENT, ALL_A)
    world.run_all()
    watcher = Watcher(world, settings(cooldown_s=20.0), history=known(URGENT, ALL_A))
    watcher.run(120, {BATCH_A: 30.0})
    assert (len(world.running(URGENT)), len(world.running(ALL_A))) == (0, 4)


def test_what_a_queue_needs_stays_though_the_rest_would_do() -> None:
    """Of six idle ones too many, none goes that only batch work keeps."""
    world = fleet(URGENT, ALL_A)
    world.run_all()
    watcher = Watcher(world, settings(cooldown_s=20.0), history=known(URGENT, ALL_A))
    watcher.run(60, {REALTIME_A: 5.0, BATCH_A: 25.0})
    for _ in range(100):
        watcher.run(1, {REALTIME_A: 5.0, BATCH_A: 25.0})
        assert len(world.running(ALL_A)) >= 3


def test_a_worker_stays_while_others_that_could_replace_it_may_be_busy() -> None:
    """Two would do for 12/s, but the one for both models may be busy with b's urgent tasks."""
    world = fleet(ALL_A, ALL_B, BOTH, each=1)
    world.run_all()
    watcher = Watcher(world, settings(cooldown_s=20.0), history=known(ALL_A, ALL_B, BOTH))
    watcher.run(200, {Lane("realtime", "b"): 7.0, Lane("default", "a"): 4.0, Lane("batch", "b"): 1.0})
    assert len(world.running()) == 3
    waits = "realtime.a, default.a, batch.a might then wait for workers busy with other tasks"
    assert watcher.look().why.endswith(f"; none is stopped, since {waits}")


def test_a_worker_goes_when_the_dedicated_ones_keep_up() -> None:
    """Four of a and one of b keep up with their models, whatever those for both are busy with."""
    world = fleet(ALL_A, ALL_B, BOTH)
    world.run_all()
    watcher = Watcher(world, settings(cooldown_s=20.0), history=known(ALL_A, ALL_B, BOTH))
    watcher.run(300, {Lane("realtime", "b"): 5.0, Lane("default", "a"): 25.0})
    assert (len(world.running(ALL_A)), len(world.running(ALL_B)), len(world.running(BOTH))) == (4, 1, 0)


# -- floor and ceiling ----------------------------------------------------------------------


@pytest.mark.parametrize(("floor", "of_a", "of_b"), [(1, 1, 0), (2, 1, 1), (3, 2, 1), (5, 3, 2), (9, 4, 2)])
def test_the_floor_is_shared_by_what_is_served(floor: int, of_a: int, of_b: int) -> None:
    """One to each part of the fleet in turn, the largest first, as far as there are instances."""
    world = Mixed.of({ALL_A: some_keys(0, 4), ALL_B: some_keys(4, 2)}, LANES)
    watcher = Watcher(world, settings(floor=floor, cooldown_s=10.0))
    watcher.run(30)
    assert (len(world.running(ALL_A)), len(world.running(ALL_B))) == (of_a, of_b)
    world.run_all()
    Watcher(world, watcher.settings).run(60)
    assert (len(world.running(ALL_A)), len(world.running(ALL_B))) == (of_a, of_b)


def test_the_floor_keeps_those_that_serve_the_most() -> None:
    """A worker that runs whatever comes is best of use for all that may come."""
    world = fleet(URGENT, ALL_A)
    Watcher(world, settings(floor=2)).run(1)
    assert (len(world.running(URGENT)), len(world.running(ALL_A))) == (0, 2)


def test_the_ceiling_leaves_each_part_with_work_a_worker() -> None:
    """A model with an endless backlog does not keep another one's first task waiting for ever."""
    world = fleet(ALL_A, ALL_B)
    watcher = Watcher(world, settings(ceiling=3, cooldown_s=10.0), history=known(ALL_A, ALL_B))
    world.lanes |= {BATCH_A: 10**6, DEFAULT_B: 10**6}
    watcher.run(60)
    assert (len(world.running(ALL_A)), len(world.running(ALL_B))) in ((1, 2), (2, 1))
    assert len(world.running()) == 3


# -- what comes to rest ---------------------------------------------------------------------

groups = some.sets(some.sampled_from([URGENT, ALL_A, ALL_B, BOTH]), min_size=1, max_size=4)


@slow
@given(
    there=groups,
    loads=some.lists(some.floats(0, 30), min_size=6, max_size=6),
    floor=some.integers(0, 2),
    rate=some.floats(0.5, 30),
)
@example(there={URGENT, ALL_A}, loads=[5.0, 0.0, 0.0, 0.0, 25.0, 0.0], floor=0, rate=10.0)
@example(there={URGENT, ALL_A, ALL_B, BOTH}, loads=[9.0, 4.0, 3.0, 8.0, 7.0, 20.0], floor=1, rate=10.0)
@example(there={ALL_A, ALL_B, BOTH}, loads=[0.0, 7.0, 4.0, 0.0, 0.0, 1.0], floor=0, rate=10.0)
@example(there={URGENT, ALL_A, ALL_B, BOTH}, loads=[0.0, 7.0, 4.0, 0.0, 0.0, 1.0], floor=1, rate=10.0)
@example(
    there={URGENT, ALL_A, ALL_B, BOTH},
    loads=[0.0, 25.92314659336229, 0.0, 22.936954147348917, 5.888115275793243, 0.0],
    floor=0,
    rate=12.5,
)
@example(
    there={URGENT, ALL_A, ALL_B, BOTH},
    loads=[0.0, 25.92314659336229, 0.0, 22.936954147348917, 5.888115275793243, 0.0],
    floor=0,
    rate=12.0,
)
@pytest.mark.parametrize("mode", ["target", "threshold"])
def test_mixed_groups_come_to_rest_under_any_constant_load(
    mode: str, there: set[Serves], loads: list[float], floor: int, rate: float
) -> None:
    """However the groups share lanes: in the end nothing is started or stopped any more."""
    world = fleet(*sorted(there), rate=rate)
    served = {
        lane: load
        for lane, load in zip(LANES, loads, strict=True)
        if any(group.covers(lane) for group in there)
    }
    watcher = Watcher(world, settings(mode=mode, floor=floor, cooldown_s=30.0))
    watcher.run(600, served)
    world.log.clear()
    watcher.run(200, served)
    assert world.log == []
    idle = [one.serves for one in world.instances.values() if not one.runs]
    for lane, load in served.items() if mode == "target" else ():
        starved = world.lanes[lane] > 100 + 400 * load
        assert not (starved and any(group.covers(lane) for group in idle)), lane


@slow
@given(there=groups, waiting=some.lists(some.integers(0, 2000), min_size=6, max_size=6))
def test_many_watchers_of_mixed_groups_start_together_what_one_would(
    there: set[Serves], waiting: list[int]
) -> None:
    """Each carries out its own part of one plan."""
    names = ["h0", "h1"]
    many = {
        group: [Key(place * 2 + number, name) for number in range(2) for name in names]
        for place, group in enumerate(sorted(there))
    }
    alone = Mixed.of(many, LANES, rate=0.0)
    alone.lanes = dict(zip(LANES, waiting, strict=True))
    together = copy.deepcopy(alone)
    one = Watcher(alone, settings(), history=known(*there))
    pair = [Watcher(together, settings(), name, frozenset(names), known(*there)) for name in names]
    for _ in range(20):
        alone.pass_second()
        one.look()
        together.pass_second()
        seen = [together.see(watcher.host, watcher.live) for watcher in pair]
        for watcher, view in zip(pair, seen, strict=True):
            watcher.look(view)
        assert together.running() == alone.running()


@slow
@given(there=groups, waiting=some.lists(some.integers(0, 100_000), min_size=6, max_size=6))
def test_nobody_is_started_for_what_he_does_not_serve(there: set[Serves], waiting: list[int]) -> None:
    """Whatever waits where: each that is started serves some of it."""
    world = fleet(*sorted(there))
    world.lanes = dict(zip(LANES, waiting, strict=True))
    look(world)
    for key in world.running():
        serves = world.instances[key].serves
        assert any(count and serves.covers(lane) for lane, count in world.lanes.items())


# -- what waits for nobody ------------------------------------------------------------------


def test_what_waits_for_nobody_is_named_with_the_command_that_helps() -> None:
    """A model nobody serves, a queue its workers leave out, and workers that are kept from running."""
    world = fleet(URGENT, each=1)
    world.lanes |= {BATCH_A: 3, DEFAULT_B: 2, REALTIME_A: 1}
    stranded = look(world).stranded or {}
    assert {lane: found.waiting for lane, found in stranded.items()} == {BATCH_A: 3, DEFAULT_B: 2}
    restart = "systemctl try-restart gpuinfer-worker@0"
    assert f"GPUINFER_WORKER_QUEUES=realtime,batch >> /etc/gpuinfer/worker@0.env && {restart}" in (
        stranded[BATCH_A].remedy
    )
    assert "GPUINFER_WORKER_MODELS=a,b >>" in stranded[DEFAULT_B].remedy
    world = fleet(URGENT, each=1)
    world.instances[Key(0, "h")] = replace(world.instances[Key(0, "h")], masked=True)
    world.lanes[REALTIME_A] = 1
    found = (look(world).stranded or {})[REALTIME_A]
    assert "systemctl unmask" in found.remedy
    one = replace(world.instances[Key(0, "h")], masked=False, target_stopped=True)
    world.instances[Key(0, "h")] = one
    found = (look(world).stranded or {})[REALTIME_A]
    assert found.remedy == "systemctl start gpuinfer-workers.target  # on h"


def test_what_waits_under_no_name_gets_a_queue() -> None:
    """Without a default model any model will do; what no worker serves is the queue."""
    worker = Server(0, "a", Serves(("realtime",), ("digits",)))
    assert remedy(Lane("batch", ""), [worker]).startswith("echo GPUINFER_WORKER_QUEUES=realtime,batch >> ")


@pytest.mark.parametrize("state", ["failed", "deactivating", "activating", "active"])
def test_what_comes_back_by_itself_leaves_nobody_stranded(state: str) -> None:
    """A worker that drains, starts, or rests after a failure serves its lanes again."""
    world = fleet(URGENT, each=1)
    world.instances[Key(0, "h")] = replace(world.instances[Key(0, "h")], state=state)  # type: ignore[arg-type]
    world.lanes[REALTIME_A] = 1
    assert look(world).stranded == {}


def test_without_a_default_model_any_worker_of_the_tier_will_do() -> None:
    """The first one to be ready makes its model the default, and serves what waits."""
    world = Mixed.of({URGENT: some_keys(0, 1), ALL_B: some_keys(1, 1)}, [Lane("batch", "")])
    world.lanes[Lane("batch", "")] = 1
    decision = look(world)
    assert (decision.stranded, world.running()) == ({}, {Key(1, "h")})
