# SPDX-License-Identifier: Apache-2.0
"""The policy: what it asks for, what it never does, and that it comes to rest."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as some

from gpuinfer.queue.depth import Lane
from gpuinfer.watcher.policy import History, decide
from gpuinfer.watcher.rates import Rates
from gpuinfer.watcher.state import GpuHealth, Instance, Key, Observation, QueueState, UnitState
from tests.watchers import KNOWN, Watcher, World, keys, observe, remembering, settings

pytestmark = pytest.mark.unit

#: Set for the long form: many more examples of loads, over longer times.
THOROUGH = bool(os.environ.get("GPUINFER_THOROUGH"))
slow = hypothesis(
    max_examples=100 if THOROUGH else 25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
#: For those that simulate long times, a millisecond a look.
slower = hypothesis(slow, max_examples=100 if THOROUGH else 6)
STATES: list[UnitState] = ["inactive", "activating", "active", "deactivating", "failed"]
NOW = 1000.0


def desired(seen: Observation, history: History | None = None, **changes: object) -> int:
    decision = decide(seen, history or remembering(KNOWN), settings(**changes), NOW)
    value = decision.inputs["desired"]
    assert isinstance(value, int)
    return value


def running(count: int, state: UnitState = "active", busy: bool = True) -> list[Instance]:
    return [Instance(key=key, state=state, since=NOW, busy=busy) for key in keys(count)]


# -- what it asks for -----------------------------------------------------------------------


def test_a_backlog_asks_for_what_drains_it_in_time() -> None:
    """1,000 tasks at 10 a second each, target 5 s after a start: twenty workers, of which eight exist."""
    idle = [Instance(key=key) for key in keys(30)]
    assert desired(observe(idle, waiting=1000)) == 20
    few = decide(observe(idle[:8], waiting=1000), remembering(KNOWN), settings(), NOW)
    assert (few.inputs["desired"], few.inputs["possible"], len(few.actions)) == (20, 8, 8)


def test_a_decision_says_what_is_missing_and_why() -> None:
    """More are wanted than there are: who is out, for which reason; and how many dead letters there are."""
    fleet = [
        *running(1),
        Instance(key=Key(1, "a"), masked=True),
        Instance(key=Key(2, "a"), gpu=GpuHealth(fault="Xid 79")),
    ]
    seen = replace(observe(fleet, waiting=1000), dead_letters=3)
    decision = decide(seen, remembering(KNOWN), settings(), NOW)
    xid = "gpu2@a (in quarantine for 30 s more: its GPU is not healthy (Xid 79))"
    assert decision.why == (
        "18 workers are desired, 1 runs: 1,000 tasks wait in default, 17 more can serve them within 15 s "
        "at 10/s each; no other instance can be started; "
        f"excluded: gpu1@a (masked, until it is unmasked), {xid}"
    )
    assert decision.inputs["dead_letters"] == 3


def test_a_drained_worker_is_neither_counted_nor_stopped() -> None:
    """Another one is started for what waits, enabled or not; when nothing waits, it is left as it is."""
    for enabled in (False, True):
        drained = Instance(key=Key(0, "a"), state="active", busy=False, drained=True, enabled=enabled)
        fleet = [drained, Instance(key=Key(1, "a"))]
        decision = decide(observe(fleet, waiting=5), remembering(KNOWN), settings(), NOW)
        assert [(action.verb, action.key.number) for action in decision.actions] == [("start", 1)]
        assert "gpu0@a (drained, until gpuinfer worker resume 0)" in decision.why
        world = observe([drained])
        history = remembering(KNOWN)
        for second in range(0, 4000, 10):
            decision = decide(world, history, settings(), NOW + second)
            history = decision.history
            assert decision.actions == ()


def test_of_many_that_are_out_a_few_are_named() -> None:
    """A line of the log stays a line."""
    fleet = [Instance(key=key, masked=True) for key in keys(1000)]
    text = decide(observe(fleet, waiting=9), History(), settings(), NOW).why
    assert text.endswith(", gpu7@a, and 992 more (masked, until it is unmasked)")
    assert len(text) < 300


def test_what_starts_already_is_counted() -> None:
    """Twenty that have just begun to start are enough for what asked for twenty."""
    starting = [Instance(key=key, state="activating", since=NOW) for key in keys(20)]
    idle = [Instance(key=Key(number, "a")) for number in range(20, 30)]
    assert desired(observe([*starting, *idle], waiting=1000)) == 20


def test_what_does_not_come_up_is_not_counted_upon() -> None:
    """A start that takes many times as long as usual holds up no other."""
    stuck = [Instance(key=key, state="activating", since=NOW - 200) for key in keys(20)]
    idle = [Instance(key=Key(number, "a")) for number in range(20, 60)]
    assert desired(observe([*stuck, *idle], waiting=1000)) == 40


def test_a_start_that_is_stuck_holds_up_no_one_more() -> None:
    """Tasks that wait too long get one more, though another one starts, if that has started for too long."""
    idle = [Instance(key=Key(number, "a")) for number in range(1, 8)]
    for age, asked in ((20, 1), (100, 2)):
        starting = Instance(key=Key(0, "a"), state="activating", since=NOW - age)
        assert desired(observe([starting, *idle], waiting=1, oldest_s=100.0)) == asked


def test_a_backlog_that_drains_in_time_asks_for_nothing() -> None:
    """Two workers serve 300 tasks in the 15 s that a new one would take to start and help."""
    fleet = [*running(2), *(Instance(key=Key(number, "a")) for number in range(2, 8))]
    assert desired(observe(fleet, waiting=300)) == 2
    assert desired(observe(fleet, waiting=301)) == 3


def test_what_falls_due_before_a_start_is_over_counts() -> None:
    """Tasks with an ETA ask for as many workers as if they waited, and from zero, too."""
    idle = [Instance(key=key) for key in keys(30)]
    due = observe(idle, waiting=0)
    due = replace(due, queues={Lane("default", ""): QueueState(due=1000)})
    assert desired(due) == 20
    assert desired(due, mode="threshold") == 1


def test_nobody_is_started_for_a_paused_queue() -> None:
    """Whatever waits there, however long; the decision says so."""
    seen = observe([Instance(key=key) for key in keys(30)], waiting=1000, oldest_s=500.0)
    paused = {lane: replace(queue, paused=True) for lane, queue in (seen.queues or {}).items()}
    decision = decide(replace(seen, queues=paused), remembering(KNOWN), settings(), NOW)
    assert decision.actions == ()
    assert "; paused, so that no worker is started for them: default" in decision.why
    assert decision.stranded == {}


def test_each_queue_has_its_target() -> None:
    """What is no hurry for batch work is one for realtime work."""
    idle = [Instance(key=key) for key in keys(200)]
    asked = {
        queue: desired(observe(idle, waiting=1000, queue=queue)) for queue in ("realtime", "default", "batch")
    }
    assert asked == {"realtime": 50, "default": 20, "batch": 1}


def test_urgent_work_delays_what_comes_after_it() -> None:
    """A queue's backlog includes the more urgent ones."""
    idle = [Instance(key=key) for key in keys(30)]
    seen = observe(idle, waiting=600, queue="realtime")
    queues = {**(seen.queues or {}), Lane("default", ""): QueueState(waiting=400)}
    both = Observation(queues=queues, instances=seen.instances)
    assert desired(both, realtime_target_s=60.0) == 20


def test_waiting_much_too_long_asks_for_one_more_whatever_the_rates_say() -> None:
    """A rate that was measured too high does not leave tasks waiting for ever."""
    fleet = [*running(2), *(Instance(key=Key(number, "a")) for number in range(2, 8))]
    assert desired(observe(fleet, waiting=5, oldest_s=19.0)) == 2
    assert desired(observe(fleet, waiting=5, oldest_s=21.0)) == 3


@pytest.mark.parametrize(("startup_s", "cooldown_s"), [(90, 60), (58, 60), (12, 60), (5, 2)])
def test_no_worker_is_stopped_while_its_tasks_wait(startup_s: int, cooldown_s: int) -> None:
    """A glimpse of idleness, as between READY and the first claim, stops nobody who has work to do."""
    world = World.of(keys(20), startup_s=float(startup_s), glimpses=True)
    world.waiting = 1000
    history = remembering(replace(KNOWN, startup_s=float(startup_s)))
    watcher = Watcher(world, settings(cooldown_s=cooldown_s, cooldown_max_s=cooldown_s), history=history)
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
    watcher = Watcher(world, settings(cooldown_s=10.0))
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
        decision = decide(seen, history, settings(cooldown_s=1.0), now)
        history = decision.history
        by_key = {instance.key: instance for instance in fleet}
        for action in decision.actions:
            target = by_key[action.key]
            if action.verb == "stop":
                assert not target.enabled
                sick = target.state == "activating" and history.units[action.key].quarantine(now)
                assert sick or (target.state, target.busy) == ("active", False)
            else:
                assert target.state in ("inactive", "failed")
                assert not target.masked
                assert (target.gpu.fault, target.gpu.hot, target.gpu.foreign_bytes) == ("", "", 0)
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
    watcher = Watcher(world, settings(floor=floor, ceiling=ceiling, cooldown_s=20.0))
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
    history = remembering(Rates(served=rate, worked=1.0, known=known))
    asked = [
        desired(observe(fleet, waiting=waiting, queue=queue), history)
        for waiting in (backlog, backlog + more)
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
    watcher = Watcher(world, settings(mode=mode, floor=floor, cooldown_s=30.0))
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
    watcher = Watcher(world, settings(cooldown_s=20.0, cooldown_max_s=300.0))

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
    watcher = Watcher(world, settings(cooldown_s=20.0, cooldown_max_s=300.0))

    def pause() -> float:
        return watcher.measured.cooldown.length(watcher.settings)

    for _ in range(40):
        world.waiting += 300
        watcher.run(50)
    assert pause() == 40.0
    watcher.run(1000)
    assert pause() == 20.0
