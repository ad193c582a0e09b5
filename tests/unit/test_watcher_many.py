# SPDX-License-Identifier: Apache-2.0
"""The policy interrupted and continued, and the policy of many watchers at once: one plan between them."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as some

from gpuinfer.queue.fleet import EVERYTHING
from gpuinfer.watcher.part import Measured
from gpuinfer.watcher.policy import History
from gpuinfer.watcher.rates import Rates
from gpuinfer.watcher.state import Key
from tests.watchers import KNOWN, Watcher, World, keys, observe, remembering, settings

pytestmark = pytest.mark.unit

slow = hypothesis(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# -- interrupted plans, as in patroni's quorum ------------------------------------------------


def forgotten(history: History) -> dict[str, Measured]:
    """Return what was measured without what the calm remembers."""
    return {name: Measured(rates=part.rates) for name, part in history.parts.items()}


def settled(world: World, history: History, forget: bool) -> set[Key]:
    """Let a new watcher take over, and return the fleet it comes to."""
    watcher = Watcher(world, settings(cooldown_s=20.0), history=History() if forget else history)
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
    watcher = Watcher(world, settings(cooldown_s=20.0), history=remembering(KNOWN))
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
                restored = replace(saved, units={}, within={}, parts=forgotten(saved)) if forget else saved
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
    one = Watcher(alone, settings(), history=remembering(KNOWN))
    many = [Watcher(together, settings(), name, frozenset(names), remembering(KNOWN)) for name in names]
    for _ in range(30):
        alone.pass_second(0)
        one.look()
        together.pass_second(0)
        seen = [together.see(watcher.host, watcher.live) for watcher in many]  # all look before any acts
        for watcher, view in zip(many, seen, strict=True):
            watcher.look(view)
        assert together.running == alone.running


OTHERS = {
    "same": KNOWN,
    "slow start": replace(KNOWN, startup_s=60.0),
    "faster": replace(KNOWN, served=40.0, worked=2.0),
    "never saturated": Rates(served=50.0),
    "new": Rates(),
}


@pytest.mark.parametrize("active", [0, 2], ids=["from zero", "from two"])
@pytest.mark.parametrize("theirs", OTHERS.values(), ids=OTHERS)
def test_watchers_that_measured_different_things_start_what_one_would(theirs: Rates, active: int) -> None:
    """Each tells what it has measured, and all decide from the same: nothing is missing, nothing too much."""
    names = frozenset("ab")
    world = World.of(keys(16, sorted(names)), rate=0.0)
    world.waiting = 1000
    for key in sorted(world.instances)[:active]:
        world.set(key, state="active", since=0.0, busy=True)
    alone = copy.deepcopy(world)
    measured = {"a": KNOWN, "b": theirs}
    views = {host: world.see(host, names) for host in measured}  # all look before any acts
    for host, rates in measured.items():
        told = {other: {str(EVERYTHING): of.figures} for other, of in measured.items() if other != host}
        seen = replace(views[host], figures=told)
        Watcher(world, settings(), host, names, remembering(rates)).look(seen)
    pooled = KNOWN.pooled([theirs.figures])
    Watcher(alone, settings(), history=remembering(pooled)).look()
    assert world.running == alone.running
    assert len(world.running) > active


def test_a_view_that_is_late_starts_nothing_twice() -> None:
    """Host b does not see yet that a has started its part: it takes its own part of the order, no more."""
    names = frozenset({"a", "b"})
    world = World.of(keys(4, names), rate=0.0)
    world.waiting = 150
    a = Watcher(world, settings(), "a", names, remembering(KNOWN))
    b = Watcher(world, settings(), "b", names, remembering(KNOWN))
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
    a, b = (Watcher(world, settings(floor=1, cooldown_s=10.0), name, names) for name in ("a", "b"))
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
    seed=some.integers(0, 2**32 - 1),  # some.randoms() would draw thousands of times, more than a run may
)
def test_many_watchers_stop_together_no_more_than_one_would(
    hosts: int, per_host: int, floor: int, seed: int
) -> None:
    """However late each sees the others' instances, and whichever it takes for busy: the floor stays."""
    draws = random.Random(seed)  # noqa: S311  no secret
    names = frozenset(f"h{number}" for number in range(hosts))
    world = World.of(keys(per_host, names))
    for key in world.instances:
        world.set(key, state="active", since=0.0)
    chosen = settings(floor=floor, cooldown_s=10.0)
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
    a = Watcher(world, settings(floor=2, cooldown_s=10.0), "a", frozenset({"a", "b"}))
    for _ in range(30):
        world.pass_second(0)
        world.set(Key(0, "b"), busy=None)
        a.look()
    assert world.log == []


def test_a_silent_host_is_not_counted_upon() -> None:
    """Nobody would start its instances, so the others take its part; its running workers still count."""
    world = World.of(keys(4, ("a", "b")), rate=0.0)
    world.waiting = 150
    a = Watcher(world, settings(), "a", frozenset({"a"}), remembering(KNOWN))
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
