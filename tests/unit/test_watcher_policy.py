# SPDX-License-Identifier: Apache-2.0
"""The policy: what it asks for, what it never does, and that it comes to rest."""

from __future__ import annotations

import copy
import math
import os
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as some

from gpuinfer.watcher.policy import History, decide
from gpuinfer.watcher.rates import Rates
from gpuinfer.watcher.state import GpuHealth, Instance, Key, Observation, UnitState
from tests.watchers import Watcher, World, keys, observe, settings

pytestmark = pytest.mark.unit

#: Set for the long form: many more examples of loads, over longer times.
THOROUGH = bool(os.environ.get("GPUINFER_THOROUGH"))
slow = hypothesis(
    max_examples=100 if THOROUGH else 25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
#: For those that simulate long times, a millisecond a look.
slower = hypothesis(slow, max_examples=100 if THOROUGH else 6)
STATES: list[UnitState] = ["inactive", "activating", "active", "deactivating", "failed"]
KNOWN = Rates(served=10.0, worked=1.0, known=True, startup_s=10.0)
NOW = 1000.0


def wanted(seen: Observation, history: History | None = None, **changes: object) -> int:
    decision = decide(seen, history or History(rates=KNOWN), settings(**changes), NOW)
    value = decision.inputs["wanted"]
    assert isinstance(value, int)
    return value


def running(count: int, state: UnitState = "active", busy: bool = True) -> list[Instance]:
    return [Instance(key=key, state=state, since=NOW, busy=busy) for key in keys(count)]


# -- what it asks for -----------------------------------------------------------------------


def test_a_backlog_asks_for_what_drains_it_in_time() -> None:
    """1,000 tasks at 10 a second each, target 5 s after a start: twenty workers, of which eight exist."""
    idle = [Instance(key=key) for key in keys(30)]
    assert wanted(observe(idle, waiting=1000)) == 20
    few = decide(observe(idle[:8], waiting=1000), History(rates=KNOWN), settings(), NOW)
    assert (few.inputs["wanted"], few.inputs["possible"], len(few.actions)) == (20, 8, 8)


def test_a_decision_says_what_is_missing_and_why() -> None:
    """More are wanted than there are: who is out, for which reason; and how many dead letters there are."""
    fleet = [
        *running(1),
        Instance(key=Key(1, "a"), masked=True),
        Instance(key=Key(2, "a"), gpu=GpuHealth(fault="Xid 79")),
    ]
    seen = replace(observe(fleet, waiting=1000), dead_letters=3)
    decision = decide(seen, History(rates=KNOWN), settings(), NOW)
    assert decision.why.startswith("18 wanted, but no instance is left to start; ")
    xid = "in quarantine for 30 s: its GPU is not well: Xid 79"
    assert decision.inputs["out"] == f"gpu1@a: masked; gpu2@a: {xid}"
    assert decision.inputs["dead_letters"] == 3


def test_of_many_that_are_out_a_few_are_named() -> None:
    """A line of the log stays a line."""
    fleet = [Instance(key=key, masked=True) for key in keys(1000)]
    text = str(decide(observe(fleet, waiting=9), History(), settings(), NOW).inputs["out"])
    assert text.endswith("; and 992 more")
    assert len(text) < 200


def test_what_starts_already_is_counted() -> None:
    """Twenty that have just begun to start are enough for what asked for twenty."""
    starting = [Instance(key=key, state="activating", since=NOW) for key in keys(20)]
    idle = [Instance(key=Key(number, "a")) for number in range(20, 30)]
    assert wanted(observe([*starting, *idle], waiting=1000)) == 20


def test_what_does_not_come_up_is_not_counted_upon() -> None:
    """A start that takes many times as long as usual holds up no other."""
    stuck = [Instance(key=key, state="activating", since=NOW - 200) for key in keys(20)]
    idle = [Instance(key=Key(number, "a")) for number in range(20, 60)]
    assert wanted(observe([*stuck, *idle], waiting=1000)) == 40


def test_a_start_that_is_stuck_holds_up_no_one_more() -> None:
    """Tasks that wait too long get one more, though another one starts, if that has started for too long."""
    idle = [Instance(key=Key(number, "a")) for number in range(1, 8)]
    for age, asked in ((20, 1), (100, 2)):
        starting = Instance(key=Key(0, "a"), state="activating", since=NOW - age)
        assert wanted(observe([starting, *idle], waiting=1, oldest_s=100.0)) == asked


def test_a_backlog_that_drains_in_time_asks_for_nothing() -> None:
    """Two workers serve 300 tasks in the 15 s that a new one would take to start and help."""
    fleet = [*running(2), *(Instance(key=Key(number, "a")) for number in range(2, 8))]
    assert wanted(observe(fleet, waiting=300)) == 2
    assert wanted(observe(fleet, waiting=301)) == 3


def test_each_queue_has_its_target() -> None:
    """What is no hurry for batch work is one for realtime work."""
    idle = [Instance(key=key) for key in keys(200)]
    asked = {
        queue: wanted(observe(idle, waiting=1000, queue=queue)) for queue in ("realtime", "default", "batch")
    }
    assert asked == {"realtime": 50, "default": 20, "batch": 1}


def test_urgent_work_delays_what_comes_after_it() -> None:
    """A queue's backlog includes the more urgent ones."""
    idle = [Instance(key=key) for key in keys(30)]
    seen = observe(idle, waiting=600, queue="realtime")
    queues = {**(seen.queues or {}), "default": observe(waiting=400).queues["default"]}  # type: ignore[index]
    both = Observation(queues=queues, instances=seen.instances)
    assert wanted(both, realtime_target_s=60.0) == 20


def test_waiting_much_too_long_asks_for_one_more_whatever_the_rates_say() -> None:
    """A rate that was measured too high does not leave tasks waiting for ever."""
    fleet = [*running(2), *(Instance(key=Key(number, "a")) for number in range(2, 8))]
    assert wanted(observe(fleet, waiting=5, oldest_s=19.0)) == 2
    assert wanted(observe(fleet, waiting=5, oldest_s=21.0)) == 3


@pytest.mark.parametrize(("startup_s", "calm_s"), [(90, 60), (58, 60), (12, 60), (5, 2)])
def test_no_worker_is_stopped_while_its_tasks_wait(startup_s: int, calm_s: int) -> None:
    """A glimpse of idleness, as between READY and the first claim, stops nobody who has work to do."""
    world = World.of(keys(20), startup_s=float(startup_s), glimpses=True)
    world.waiting = 1000
    history = History(rates=replace(KNOWN, startup_s=float(startup_s)))
    watcher = Watcher(world, settings(calm_s=calm_s, calm_max_s=calm_s), history=history)
    for _ in range(startup_s + 20):
        watcher.run(1)
        needed = math.ceil(world.waiting / (10 * 5))
        assert "stop" not in world.verbs(world.now) or len(world.running) >= needed, world.waiting
    assert world.verbs().count("start") == 20


def test_who_has_just_become_ready_is_not_stopped() -> None:
    """It has had no time to claim; two looks later it may be."""
    world = World.of(keys(2))
    for key in world.instances:
        world.set(key, state="active", since=0.0)
    watcher = Watcher(world, settings(calm_s=10.0))
    for _ in range(20):
        world.pass_second(0)
        world.set(Key(1, "a"), since=world.now - 1.5)
        watcher.look()
    assert world.running == {Key(1, "a")}
    watcher.run(5)
    assert world.running == set()


def test_scale_to_zero_and_back() -> None:
    """Nothing runs without work; the first task starts one worker within a look."""
    world = World.of(keys(4))
    watcher = Watcher(world, settings())
    watcher.run(100)
    assert world.running == set()
    world.pass_second(1)
    assert watcher.look().verdict == "scale_up"
    watcher.run(200)
    assert world.running == set()


def test_threshold_mode_starts_one_at_a_time_up_to_its_limit() -> None:
    """More than N wait: one more each ten seconds, at most M; down again when it is calm."""
    world = World.of(keys(8), rate=0.0)
    watcher = Watcher(world, settings(mode="threshold", threshold_workers=3))
    world.waiting = 51
    watcher.run(9)
    assert len(world.running) == 1
    watcher.run(60)
    assert len(world.running) == 3
    world.rate = 100.0
    watcher.run(200)
    assert world.running == set()


def test_threshold_mode_needs_more_than_the_threshold() -> None:
    """Exactly N is not more than N."""
    world = World.of(keys(2), rate=0.0)
    world.waiting = 50
    Watcher(world, settings(mode="threshold")).run(60)
    assert world.running == set()


def test_redis_unreadable_holds_everything() -> None:
    """Whatever is wrong with Redis, the count stays."""
    world = World.of(keys(4))
    watcher = Watcher(world, settings())
    watcher.run(30, arrivals=35)
    before = world.running
    for _ in range(1000):
        world.now += 1
        decision = watcher.look(
            Observation(queues=None, instances=tuple(world.instances.values()), trouble="away")
        )
        assert (decision.actions, decision.verdict) == ((), "hold")
    assert "away" in decision.why
    assert world.running == before
    world.waiting = 0
    watcher.run(30)
    assert world.running == before  # calm begins anew


# -- what it never does ---------------------------------------------------------------------

instances = some.builds(
    Instance,
    key=some.builds(Key, some.integers(0, 5), some.sampled_from(["a", "b"])),
    state=some.sampled_from(STATES),
    since=some.floats(0, NOW),
    enabled=some.booleans(),
    masked=some.booleans(),
    restarts=some.integers(0, 3),
    busy=some.sampled_from([True, False, None]),
    gpu=some.builds(
        GpuHealth,
        foreign_bytes=some.sampled_from([0, 2**33]),
        fault=some.sampled_from(["", "Xid 79"]),
        hot=some.sampled_from(["", "95 degrees"]),
    ),
)
fleets = some.lists(instances, max_size=12, unique_by=lambda instance: instance.key)


@hypothesis(max_examples=200, deadline=None)
@given(
    looks=some.lists(some.tuples(fleets, some.integers(0, 5000)), min_size=1, max_size=6),
    calm=some.booleans(),
)
def test_nothing_forbidden_is_ever_done(looks: list[tuple[list[Instance], int]], calm: bool) -> None:
    """Enabled and busy ones are never stopped; masked, failed, sick, hot and foreign ones never started."""
    history = History()
    now = NOW
    for fleet, waiting in looks:
        now += 1.0 if not calm else 0.9
        seen = observe(fleet, waiting=0 if calm else waiting)
        decision = decide(seen, history, settings(calm_s=1.0), now)
        history = decision.history
        by_key = {instance.key: instance for instance in fleet}
        for action in decision.actions:
            target = by_key[action.key]
            if action.verb == "stop":
                assert not target.enabled
                sick = target.state == "activating" and history.units[action.key].resting(now)
                assert sick or (target.state, target.busy) == ("active", False)
            elif action.verb == "start":
                assert (target.state, target.masked) == ("inactive", False)
                assert (target.gpu.fault, target.gpu.hot, target.gpu.foreign_bytes) == ("", "", 0)
            else:
                assert (target.state, target.masked, target.gpu.fault) == ("failed", False, "")
        assert len({action.key for action in decision.actions}) == len(decision.actions)


@slower
@given(
    load=some.lists(some.floats(0, 200), min_size=1, max_size=4),
    floor=some.integers(0, 3),
    more=some.integers(0, 3),
    rate=some.floats(0.2, 50),
)
def test_floor_and_ceiling_hold_under_any_load(load: list[float], floor: int, more: int, rate: float) -> None:
    """Never more than the ceiling; never fewer than the floor once it was reached."""
    ceiling = floor + more or 1
    world = World.of(keys(6), rate=rate)
    watcher = Watcher(world, settings(floor=floor, ceiling=ceiling, calm_s=20.0))
    watcher.run(1)
    for arrivals in load:
        for _ in range(100):
            watcher.run(1, arrivals)
            assert floor <= len(world.running) <= ceiling


@slow
@given(
    backlog=some.integers(0, 100_000),
    more=some.integers(0, 100_000),
    active=some.integers(0, 10),
    rate=some.floats(0.1, 1000),
    queue=some.sampled_from(["realtime", "default", "batch"]),
    known=some.booleans(),
)
def test_more_backlog_never_asks_for_fewer(
    backlog: int, more: int, active: int, rate: float, queue: str, known: bool
) -> None:
    """Monotone in the backlog, all else equal."""
    fleet = [*running(active), *(Instance(key=Key(number, "a")) for number in range(active, 500))]
    history = History(rates=Rates(served=rate, worked=1.0, known=known))
    asked = [
        wanted(observe(fleet, waiting=waiting, queue=queue), history) for waiting in (backlog, backlog + more)
    ]
    assert asked[0] <= asked[1]


@slower
@given(
    arrivals=some.floats(0.2, 40),
    rate=some.floats(0.5, 40),
    startup_s=some.integers(1, 30),
    floor=some.integers(0, 2),
)
@example(arrivals=15.0, rate=10.0, startup_s=10, floor=0)
@example(arrivals=28.0, rate=10.0, startup_s=10, floor=0)
@pytest.mark.parametrize("mode", ["target", "threshold"])
def test_no_flapping_under_any_constant_load(
    mode: str, arrivals: float, rate: float, startup_s: int, floor: int
) -> None:
    """However loads and rates lie to each other, the fleet comes to rest and stays as it is."""
    world = World.of(keys(8), rate=rate, startup_s=float(startup_s))
    watcher = Watcher(world, settings(mode=mode, floor=floor, calm_s=30.0))
    watcher.run(1500 if THOROUGH else 600, arrivals)
    world.log.clear()
    watcher.run(5000 if THOROUGH else 300, arrivals)
    assert world.log == []


@slower
@given(period=some.integers(20, 280), burst=some.integers(50, 3000))
@example(period=52, burst=1094)
@example(period=280, burst=1000)
def test_a_load_that_comes_and_goes_stops_flapping(period: int, burst: int) -> None:
    """Bursts more often than the longest calm period are met, in the end, by workers that stay."""
    world = World.of(keys(5), rate=10.0)
    watcher = Watcher(world, settings(calm_s=20.0, calm_max_s=300.0))

    def bursts(count: int) -> None:
        for _ in range(count):
            world.waiting += burst
            watcher.run(period)

    bursts(1500 // period)
    world.log.clear()
    bursts((6000 if THOROUGH else 1000) // period)
    assert "start" not in world.verbs()


def test_the_calm_period_is_short_again_when_nothing_needs_a_long_one() -> None:
    """Found by bursts, kept while they go on, halved step by step after them."""
    world = World.of(keys(4), rate=10.0)
    watcher = Watcher(world, settings(calm_s=20.0, calm_max_s=300.0))

    def pause() -> float:
        return watcher.history.calm.pause(watcher.settings)

    for _ in range(40):
        world.waiting += 300
        watcher.run(50)
    assert pause() == 40.0
    watcher.run(1000)
    assert pause() == 20.0


# -- interrupted plans, as in patroni's quorum ------------------------------------------------


def settled(world: World, history: History, forget: bool) -> set[Key]:
    """Let a new watcher take over, and return the fleet it comes to."""
    watcher = Watcher(world, settings(calm_s=20.0), history=History() if forget else history)
    watcher.run(120)
    starts = [action.key for _, action in world.log if action.verb == "start"]
    assert len(starts) == len(set(starts)), "an instance was started twice"
    return world.running


@pytest.mark.parametrize("forget", [True, False], ids=["forgetful", "with its history"])
@pytest.mark.parametrize("waiting", [400, 1000, 5000, 0], ids=str)
def test_every_interrupted_plan_comes_to_the_same_fleet(waiting: int, forget: bool) -> None:
    """Killed after any action of any plan, and started again: the same workers run, none started twice."""
    world = World.of(keys(4, ("a", "b")), rate=0.0 if waiting else 10.0)
    world.waiting = waiting
    if not waiting:
        for key in list(world.instances)[1:]:
            world.set(key, state="active")
    watcher = Watcher(world, settings(calm_s=20.0), history=History(rates=KNOWN))
    target = settled(copy.deepcopy(world), watcher.history, forget=False)
    plans = 0
    for _ in range(40):
        world.pass_second(0)
        before, history = copy.deepcopy(world), watcher.history
        decision = watcher.look()
        for done in range(len(decision.actions) + 1 if decision.actions else 0):
            for saved in (history, decision.history):
                cut = copy.deepcopy(before)
                cut.do(decision.actions[:done])
                restored = History(rates=saved.rates) if forget else saved
                assert settled(cut, restored, forget=False) == target
        plans += bool(decision.actions)
    assert plans


# -- many watchers --------------------------------------------------------------------------


@slow
@given(hosts=some.integers(1, 5), per_host=some.integers(1, 4), waiting=some.integers(0, 3000))
def test_many_watchers_start_together_what_one_would(hosts: int, per_host: int, waiting: int) -> None:
    """Each carries out its own part of the same plan, seen from the same moment."""
    names = [f"h{number}" for number in range(hosts)]
    alone = World.of(keys(per_host, names), rate=0.0)
    together = copy.deepcopy(alone)
    alone.waiting = together.waiting = waiting
    one = Watcher(alone, settings(), history=History(rates=KNOWN))
    many = [Watcher(together, settings(), name, frozenset(names), History(rates=KNOWN)) for name in names]
    for _ in range(30):
        alone.pass_second(0)
        one.look()
        together.pass_second(0)
        seen = [together.see(watcher.host, watcher.live) for watcher in many]  # all look before any acts
        for watcher, view in zip(many, seen, strict=True):
            watcher.look(view)
        assert together.running == alone.running


def test_a_view_that_is_late_starts_nothing_twice() -> None:
    """Host b does not see yet that a has started its part: it takes its own part of the order, no more."""
    names = frozenset({"a", "b"})
    world = World.of(keys(4, names), rate=0.0)
    world.waiting = 150
    a = Watcher(world, settings(), "a", names, History(rates=KNOWN))
    b = Watcher(world, settings(), "b", names, History(rates=KNOWN))
    late = world.see("b", names)
    a.look()
    b.look(late)
    assert world.running == {Key(0, "a"), Key(0, "b"), Key(1, "a")}


@pytest.mark.parametrize("busy", [None, False, True], ids=["silent", "idle", "busy"])
def test_a_view_that_is_late_stops_nothing_too_much(busy: bool | None) -> None:
    """Host a does not see yet that b has stopped the one too many: it stops none of its own instead."""
    names = frozenset({"a", "b"})
    world = World.of([Key(0, "a"), Key(0, "b")])
    for key in world.instances:
        world.set(key, state="active", since=0.0)
    a, b = (Watcher(world, settings(floor=1, calm_s=10.0), name, names) for name in ("a", "b"))
    while not world.log:
        world.pass_second(0)
        late = world.see("a", names)
        b.look()
        a.decide(late)
    assert world.running == {Key(0, "a")}
    told = [replace(one, busy=busy) if one.key.host == "b" else one for one in late.instances]
    for _ in range(3):
        world.pass_second(0)
        a.look(replace(late, instances=tuple(told)))
    assert world.running == {Key(0, "a")}


@slow
@given(
    hosts=some.integers(2, 4),
    per_host=some.integers(1, 3),
    floor=some.integers(0, 3),
    draws=some.randoms(use_true_random=False),
)
def test_many_watchers_stop_together_no_more_than_one_would(
    hosts: int, per_host: int, floor: int, draws: random.Random
) -> None:
    """However late each sees the others' instances, and whichever it takes for busy: the floor stays."""
    names = frozenset(f"h{number}" for number in range(hosts))
    world = World.of(keys(per_host, names))
    for key in world.instances:
        world.set(key, state="active", since=0.0)
    chosen = settings(floor=floor, calm_s=10.0)
    many = [Watcher(world, chosen, name, names) for name in sorted(names)]
    views = [dict(world.instances) for _ in many]
    for _ in range(60):
        world.pass_second(0)
        for watcher, view in zip(many, views, strict=True):
            for key, instance in world.instances.items():
                if key.host == watcher.host or draws.random() < 0.3:
                    view[key] = instance
                elif draws.random() < 0.5:
                    view[key] = replace(view[key], busy=draws.choice([None, False, True]))
            watcher.look(observe(view.values(), host=watcher.host, live=names))
            assert len(world.running) >= min(floor, hosts * per_host)
    for watcher in many:  # and with a true view all comes to the floor
        for _ in range(10):
            world.pass_second(0)
            watcher.look()
    assert len(world.running) <= max(floor, 0)


def test_what_was_not_heard_of_for_long_is_not_counted_when_others_are_stopped() -> None:
    """Of b nothing beats, though it is told to be active; the last of those that do is no surplus."""
    world = World.of([Key(0, "a"), Key(0, "b"), Key(1, "a")])
    for key in world.instances:
        world.set(key, state="active", since=0.0)
    a = Watcher(world, settings(floor=2, calm_s=10.0), "a", frozenset({"a", "b"}))
    for _ in range(30):
        world.pass_second(0)
        world.set(Key(0, "b"), busy=None)
        a.look()
    assert world.log == []


def test_a_silent_host_is_not_counted_upon() -> None:
    """Nobody would start its instances, so the others take its part; its running workers still count."""
    world = World.of(keys(4, ("a", "b")), rate=0.0)
    world.waiting = 150
    a = Watcher(world, settings(), "a", frozenset({"a"}), History(rates=KNOWN))
    a.look()
    assert world.running == {Key(0, "a"), Key(1, "a"), Key(2, "a")}


def test_each_host_stops_one_at_a_time() -> None:
    """Scaling down is gentle: one idle worker a host and look, the last of the order first."""
    world = World.of(keys(3, ("a", "b")))
    for key in world.instances:
        world.set(key, state="active")
    watcher = Watcher(world, settings())
    while not world.log:
        watcher.run(1)
    assert {action.key for _, action in world.log} == {Key(2, "a"), Key(2, "b")}
