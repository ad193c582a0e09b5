# SPDX-License-Identifier: Apache-2.0
"""What is remembered of instances: quarantine, manual starts and stops, failed starts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from gpuinfer.watcher import notes
from gpuinfer.watcher.memory import UnitMemory, adopt, remember
from gpuinfer.watcher.state import HEALTHY, GpuHealth, Hold, Instance, Key, UnitState
from tests.watchers import KNOWN, Watcher, World, keys, observe, remembering, settings

pytestmark = pytest.mark.unit

A0 = Key(0, "a")


def busy_world(count: int) -> World:
    """Return a world with a backlog that never ends."""
    world = World.of(keys(count), rate=0.0)
    world.waiting = 100_000
    return world


def test_a_failed_instance_rests_twice_as_long_each_time() -> None:
    """Quarantine of 30, 60, 120 s and so on, up to the maximum; then it is reset, and tried again."""
    world = busy_world(1)
    watcher = Watcher(world, settings(quarantine_max_s=120.0), history=remembering(KNOWN))
    rests = []
    for _ in range(5):
        watcher.run(1)
        assert world.instances[A0].state == "activating"
        world.set(A0, state="failed", since=world.now)
        failed_at = world.now
        while world.instances[A0].state == "failed":
            watcher.run(1)
        rests.append(round(world.now - failed_at - 1))
    assert rests == [30, 60, 120, 120, 120]


def test_a_start_that_systemd_tries_again_and_again_is_a_failure() -> None:
    """It holds up no other, is stopped after the second try, and rests; it counts for no start."""
    world = World.of(keys(4), startup_s=30.0, rate=0.0)
    world.waiting = 3
    watcher = Watcher(
        world, settings(quarantine_s=300.0), history=remembering(replace(KNOWN, startup_s=30.0))
    )
    crash_loop(world, watcher, 45)
    assert world.running == {A0, Key(1, "a")}
    unit = watcher.history.units[A0]
    assert (unit.failures, unit.hold) == (1, "")
    assert "starts it again and again" in unit.why
    crash_loop(world, watcher, 35)
    assert world.instances[Key(1, "a")].state == "active"
    assert [(action.verb, action.key.number) for _, action in world.log] == [
        *[("start", 0), ("start", 1), ("stop", 0)]
    ]
    assert watcher.measured.rates.startup_s == 30.0
    assert watcher.measured.cooldown.last_down is None  # nothing was too many


def test_a_start_that_fails_once_may_be_tried_again_by_systemd() -> None:
    """What was wrong may have passed: it serves, and nobody has stopped it."""
    world = World.of(keys(1), startup_s=5.0, rate=0.0)
    world.waiting = 3
    watcher = Watcher(world, settings(), history=remembering(replace(KNOWN, startup_s=5.0)))
    crash_loop(world, watcher, 8)
    assert watcher.history.units[A0].failures == 1
    watcher.run(10)
    assert (world.instances[A0].state, world.verbs()) == ("active", ["start"])


def test_what_is_enabled_and_does_not_come_up_is_not_counted_upon() -> None:
    """It is not stopped, for it never is; but another one serves meanwhile."""
    world = World.of(keys(2), startup_s=10.0, rate=0.0)
    world.set(A0, enabled=True)
    world.waiting = 3
    watcher = Watcher(world, settings(), history=remembering(KNOWN))
    crash_loop(world, watcher, 25)
    assert world.verbs() == ["start", "start"]
    assert world.instances[Key(1, "a")].state == "active"


def test_a_restart_after_a_time_of_service_is_no_failed_start() -> None:
    """A worker that crashed comes back by itself, counted upon; its start-up time counts from then."""
    world = busy_world(1)
    watcher = Watcher(world, settings(), history=remembering(KNOWN))
    watcher.run(100)
    for state, restarts in (("deactivating", 0), ("activating", 0), ("activating", 1)):
        world.set(A0, state=state, since=world.now, restarts=restarts)
        watcher.run(3)
    watcher.run(10)
    assert (world.instances[A0].state, world.verbs()) == ("active", ["start"])
    assert watcher.history.units[A0].failures == 0
    assert watcher.measured.rates.startup_s == pytest.approx(10, abs=1)


def test_who_serves_for_less_than_a_look_has_served() -> None:
    """A worker that ends at its first task, by a hard time limit, was ready: systemd tells when."""
    world = busy_world(1)
    watcher = Watcher(world, settings(), history=remembering(KNOWN))
    watcher.run(5)
    assert world.instances[A0].state == "activating"
    world.set(A0, since=world.now, ready_at=world.now - 0.5, restarts=1)
    watcher.run(3)
    assert watcher.history.units[A0].failures == 0
    world.set(A0, since=world.now, restarts=2)
    watcher.run(1)
    assert watcher.history.units[A0].failures == 1


def test_a_reset_of_systemds_count_is_no_restart() -> None:
    """A unit resets it when a task ends its process by a hard limit; a probe may come between the two."""
    world = busy_world(1)
    watcher = Watcher(world, settings(), history=remembering(KNOWN))
    watcher.run(15)
    assert world.instances[A0].state == "active"
    for restarts, state in ((1, "active"), (0, "deactivating"), (1, "activating")):
        world.set(A0, since=world.now, state=state, restarts=restarts)
        watcher.run(1)
    assert watcher.history.units[A0].failures == 0
    world.set(A0, since=world.now, restarts=2)
    watcher.run(1)
    assert watcher.history.units[A0].failures == 1


def crash_loop(world: World, watcher: Watcher, seconds: int) -> None:
    """Let gpu0 end whenever it should be ready, and systemd start it again two seconds later."""
    for _ in range(seconds):
        one = world.instances[A0]
        if one.state == "activating" and world.now + 1 - one.since >= world.startup_s:
            world.set(A0, since=world.now + 2, restarts=one.restarts + 1)
        elif one.state == "inactive":
            world.set(A0, restarts=0)
        watcher.run(1)


def test_a_start_without_effect_is_a_failure() -> None:
    """A condition that is not met leaves it inactive: two looks, and the next of the order is asked."""
    world = World.of(keys(3), rate=0.0)
    world.waiting = 1
    watcher = Watcher(world, settings(), history=remembering(KNOWN))
    asked = []
    for _ in range(15):
        world.pass_second(0)
        actions = watcher.decide().actions
        asked += [action.key.number for action in actions]
        world.do([action for action in actions if action.key != A0])
    assert asked[:3] == [0, 0, 1]
    assert world.running == {Key(1, "a")}
    unit = watcher.history.units[A0]
    assert (unit.failures, unit.why) == (1, "a start had no effect")


def test_a_start_that_waits_for_others_is_none_without_effect() -> None:
    """systemd has a job for it, which waits until Redis is up."""
    world = World.of(keys(1), rate=0.0)
    world.waiting = 1
    world.set(A0, queued=True)
    watcher = Watcher(world, settings(), history=remembering(KNOWN))
    for _ in range(50):
        world.pass_second(0)
        watcher.decide()
    assert watcher.history.units[A0].failures == 0
    world.set(A0, queued=False, state="activating", since=world.now)
    watcher.run(20)
    assert (world.running, watcher.history.units[A0].hold) == ({A0}, "")


def test_who_only_logs_waits_for_no_effect() -> None:
    """What it would do nobody does: that is no failure, and no command of its own."""
    world = World.of(keys(1), rate=0.0)
    world.waiting = 1
    watcher = Watcher(world, settings(), history=remembering(KNOWN))
    for _ in range(50):
        world.pass_second(0)
        assert watcher.decide(replace(world.see(), acts=False)).verdict == "scale_up"
    assert (watcher.history.units[A0].failures, watcher.history.units[A0].verb) == (0, None)


def test_quarantine_says_why() -> None:
    """The reason is there for the caller who asks."""
    world = busy_world(1)
    world.set(A0, gpu=GpuHealth(fault="Xid 79, it has fallen off the bus"))
    watcher = Watcher(world, settings())
    decision = watcher.look()
    assert decision.actions == ()
    assert "Xid 79" in decision.history.units[A0].why


def test_a_gpu_that_stays_sick_is_never_tried() -> None:
    """Its rest grows while the fault lasts, and begins anew after it is gone only when it fails again."""
    world = busy_world(2)
    world.set(A0, gpu=GpuHealth(fault="ECC"))
    watcher = Watcher(world, settings())
    watcher.run(500)
    assert world.running == {Key(1, "a")}
    world.set(A0, gpu=GpuHealth())
    watcher.run(500)
    assert world.running == {A0, Key(1, "a")}


def test_long_health_is_forgiveness() -> None:
    """After as long as the longest rest without a failure, the count begins at one again."""
    world = busy_world(1)
    watcher = Watcher(world, settings(quarantine_max_s=60.0), history=remembering(KNOWN))
    watcher.run(1)
    world.set(A0, state="failed")
    watcher.run(40)
    assert watcher.history.units[A0].failures == 1
    watcher.run(80)
    assert watcher.history.units[A0].failures == 0


@pytest.mark.parametrize(("every_s", "failures"), [(24 * 3600, 1), (3 * 3600, 1), (600, 7)])
def test_failures_that_are_far_apart_do_not_add_up(every_s: int, failures: int) -> None:
    """Served in between or not: one that crashes once a day never rests longer than the first time."""
    unit, now, counted = UnitMemory(state="inactive", since=0.0), 0.0, []
    for _ in range(7):
        for state in ("failed", "inactive"):
            seen = observe([Instance(key=A0, state=state, since=now)])
            unit = remember(seen, {A0: unit}, settings(quarantine_s=1.0), now).units[A0]
            counted.append(unit.failures)
            now += every_s / 2
    assert counted[-2] == failures


def test_a_gpu_of_which_nothing_is_known_yet_is_no_failure() -> None:
    """It is not started, and as soon as it has answered it is: there is nothing to forgive."""
    world = busy_world(1)
    world.set(A0, gpu=GpuHealth(unknown="its GPU's driver has not answered NVML yet"))
    watcher = Watcher(world, settings())
    watcher.run(100)
    assert (world.running, watcher.history.units[A0].failures) == (set(), 0)
    world.set(A0, gpu=HEALTHY)
    watcher.run(1)
    assert world.running == {A0}


def test_an_xid_is_an_event_and_makes_the_rest_grow() -> None:
    """Told at one look each, also while it serves; each time its instance rests twice as long."""
    world = busy_world(1)
    watcher = Watcher(world, settings(quarantine_max_s=600.0), history=remembering(KNOWN))
    watcher.run(2000)
    rests = []
    for _ in range(3):
        world.set(A0, gpu=GpuHealth(fault="Xid 48"))
        watcher.run(1)
        world.set(A0, gpu=HEALTHY)
        watcher.run(1)
        unit = watcher.history.units[A0]
        assert "Xid 48" in unit.why
        rests.append(round(unit.quarantined_until - world.now + 1))
        watcher.run(300)
    assert rests == [30, 60, 120]
    watcher.run(600)
    assert watcher.history.units[A0].failures == 0


def test_an_xid_that_made_its_unit_fail_is_the_reason() -> None:
    """Whichever is seen first."""
    for first, second in (("failed", "Xid 79"), ("Xid 79", "failed")):
        world = busy_world(1)
        watcher = Watcher(world, settings(), history=remembering(KNOWN))
        watcher.run(20)
        for what in (first, second):
            if what == "failed":
                world.set(A0, state="failed", since=world.now)
            world.set(A0, gpu=GpuHealth(fault="" if what == "failed" else what))
            watcher.run(1)
        assert "Xid 79" in watcher.history.units[A0].why


def test_a_hot_gpu_is_left_alone_until_it_has_cooled_down() -> None:
    """Heat is no failure: nothing to remember, and the worker that runs on it goes on."""
    world = busy_world(2)
    hot = GpuHealth(hot="it is 95 degrees hot, and slows down at 92")
    world.set(A0, gpu=hot)
    world.set(Key(1, "a"), state="active", gpu=hot)
    watcher = Watcher(world, settings())
    watcher.run(100)
    assert world.running == {Key(1, "a")}
    assert watcher.history.units[A0].failures == 0
    world.set(A0, gpu=HEALTHY)
    watcher.run(1)
    assert A0 in world.running


def test_a_gpu_others_use_is_left_alone() -> None:
    """Somebody's training run is not pushed out of memory; once it is gone, the GPU is ours."""
    world = busy_world(1)
    world.set(A0, gpu=GpuHealth(foreign_bytes=3 * 2**30))
    watcher = Watcher(world, settings())
    decision = watcher.look()
    assert decision.actions == ()
    world.set(A0, gpu=GpuHealth(foreign_bytes=2**29))
    assert [action.verb for action in watcher.look().actions] == ["start"]


def stopped_by_hand(*, enabled: bool = False) -> tuple[World, Watcher]:
    """Return a world with a backlog, whose only instance an administrator has stopped."""
    world = busy_world(1)
    world.set(A0, enabled=enabled, state="active")
    watcher = Watcher(world, settings(manual_hold_s=100.0))
    watcher.run(30)
    world.set(A0, state="inactive", since=world.now)
    watcher.run(5000)
    assert world.running == set()
    return world, watcher


@pytest.mark.parametrize("enabled", [False, True])
def test_a_stop_by_hand_holds_until_a_start(enabled: bool) -> None:
    """However long the queue, and whether it is enabled or not; after a start it is ours again."""
    world, watcher = stopped_by_hand(enabled=enabled)
    world.set(A0, state="active", since=world.now)
    watcher.run(5)
    assert watcher.history.units[A0].hold == "started"
    watcher.run(200)
    assert watcher.history.units[A0].hold == ""


def test_a_stop_of_all_lasts_until_their_target_is_started() -> None:
    """It means "not now" for all of them; only what was stopped by hand before stays stopped after it."""
    world = busy_world(3)
    for key in world.instances:
        world.set(key, state="active", enabled=key == A0)
    watcher = Watcher(world, settings())
    watcher.run(30)
    world.set(Key(2, "a"), state="inactive")
    watcher.run(30)
    for key in (A0, Key(1, "a")):
        world.set(key, target_stopped=True, state="deactivating")
    world.set(Key(2, "a"), target_stopped=True)
    watcher.run(40)  # they drain for long
    world.set(A0, state="inactive")
    world.set(Key(1, "a"), state="inactive")
    watcher.run(500)
    assert world.running == set()
    last = watcher.decide()
    assert "gpuinfer-workers.target is stopped, until it is started, or the host boots" in last.why
    assert not any(why.ends for why in last.excluded.values())
    for key in world.instances:
        world.set(key, target_stopped=False)
    watcher.run(1)
    assert world.running == {A0, Key(1, "a")}
    assert watcher.history.units[Key(2, "a")].hold == "stopped"


def test_one_may_be_started_by_hand_while_all_are_stopped() -> None:
    """It runs, and is stopped when nothing needs it any more."""
    world = World.of(keys(1))
    world.set(A0, target_stopped=True)
    watcher = Watcher(world, settings(manual_hold_s=100.0, cooldown_s=10.0))
    watcher.run(5)
    world.set(A0, state="active", since=world.now)
    watcher.run(50)
    assert world.running == {A0}
    watcher.run(200)
    assert (world.running, watcher.history.units[A0].hold) == (set(), "")


def test_a_stop_by_hand_holds_until_an_enable() -> None:
    """What is enabled runs."""
    world, watcher = stopped_by_hand()
    world.set(A0, enabled=True)
    watcher.run(1)
    assert world.running == {A0}


def test_a_stop_by_hand_holds_over_a_restart_of_the_watcher_and_not_over_a_boot() -> None:
    """It is kept with the boot's id."""
    world, watcher = stopped_by_hand()
    kept = notes.pack(watcher.history, "this boot")
    for boot, running in (("this boot", set()), ("the next", {A0})):
        history = notes.unpack(kept, boot)
        units = adopt(history.units, world.instances.values())
        again = Watcher(copy.deepcopy(world), settings(), history=replace(history, units=units))
        again.run(2)
        assert again.world.running == running


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "while no watcher looked"])
def test_a_change_from_enabled_to_disabled_holds(seen: bool) -> None:
    """It runs on until nothing needs it, and is not started on demand; one that was never enabled is."""
    world = World.of(keys(2))
    for key in world.instances:
        world.set(key, enabled=key == A0, state="active")
    watcher = Watcher(world, settings(cooldown_s=10.0))
    watcher.run(2)
    world.set(A0, enabled=False)
    if not seen:
        watcher.history = replace(
            watcher.history, units=adopt(watcher.history.units, world.instances.values())
        )
    watcher.run(200)
    assert world.running == set()
    world.waiting, world.rate = 100_000, 0.0
    watcher.run(30)
    assert world.running == {Key(1, "a")}
    world.set(A0, enabled=True)
    watcher.run(1)
    assert A0 in world.running


def test_a_stop_that_comes_with_a_mask_ends_with_it() -> None:
    """`mask --runtime --now` is for tonight; and one that does not run is not started either."""
    world = busy_world(2)
    watcher = Watcher(world, settings())
    world.set(Key(1, "a"), masked=True)
    watcher.run(30)
    assert world.running == {A0}
    world.set(A0, masked=True, state="inactive", since=world.now)
    watcher.run(1000)
    assert world.running == set()
    for key in world.instances:
        world.set(key, masked=False)
    watcher.run(1)
    assert world.running == set(world.instances)


def test_between_the_two_halves_of_a_restart_nobody_has_stopped_it() -> None:
    """inactive for a moment, with a job that starts it again."""
    world = busy_world(1)
    watcher = Watcher(world, settings())
    watcher.run(30)
    for changes in ({"state": "inactive", "queued": True}, {"state": "activating", "queued": False}):
        world.set(A0, since=world.now, **changes)
        watcher.run(1)
        assert not watcher.history.units[A0].hold


def test_a_manual_start_is_respected_for_the_stated_time() -> None:
    """What an administrator starts is not stopped though nothing needs it; later it is."""
    world = World.of(keys(2))
    watcher = Watcher(world, settings(manual_hold_s=200.0, cooldown_s=10.0))
    watcher.run(30)
    world.set(A0, state="activating", since=world.now)
    watcher.run(195)
    assert world.running == {A0}
    watcher.run(20)
    assert world.running == set()


def test_the_time_of_a_manual_start_counts_from_when_it_serves() -> None:
    """A large model that loads for longer than the stated time is not stopped as soon as it is ready."""
    world = World.of(keys(1), startup_s=300.0)
    watcher = Watcher(world, settings(manual_hold_s=100.0, cooldown_s=10.0))
    watcher.run(30)
    world.set(A0, state="activating", since=world.now)
    watcher.run(395)
    assert world.running == {A0}
    watcher.run(20)
    assert world.running == set()


def test_our_own_starts_and_stops_are_not_taken_for_manual_ones() -> None:
    """Up and down again without a hold in between."""
    world = World.of(keys(1))
    watcher = Watcher(world, settings(cooldown_s=10.0))
    for _ in range(3):
        world.waiting += 5
        watcher.run(300)
        assert world.running == set()
    assert not any(unit.hold for unit in watcher.history.units.values())


def test_an_enabled_instance_is_started_and_never_stopped() -> None:
    """Enabled instances are the floor, and above any ceiling."""
    world = World.of(keys(3))
    for key in world.instances:
        world.set(key, enabled=True)
    Watcher(world, settings(ceiling=1)).run(1000)
    assert world.running == set(world.instances)
    assert world.verbs() == ["start"] * 3


def test_a_restart_is_no_wish() -> None:
    """active, then activating: systemd or an administrator restarts it; it stays ours."""
    world = busy_world(1)
    watcher = Watcher(world, settings())
    watcher.run(30)
    world.set(A0, state="activating", since=world.now)
    watcher.run(1)
    assert not watcher.history.units[A0].hold


def test_a_restart_or_a_crash_that_is_seen_half_way_is_no_wish() -> None:
    """deactivating, then activating: who comes back at once was not to stop, nor is it a manual start."""
    world = busy_world(1)
    watcher = Watcher(world, settings())
    watcher.run(100)
    for state in ("deactivating", "activating", "active"):
        world.set(A0, state=state, since=world.now)
        watcher.run(2)
    assert not watcher.history.units[A0].hold


def test_a_drain_that_takes_long_is_known_for_what_it_was() -> None:
    """Two minutes from our stop to its end are still our stop; from an administrator's, they are his."""
    theirs = UnitMemory(state="deactivating", since=1000.5)
    ours = replace(theirs, verb="stop", verb_at=1000.0)
    seen = observe([Instance(key=A0, state="inactive", since=1120.0)])
    for before, hold in ((ours, ""), (theirs, "stopped")):
        assert remember(seen, {A0: before}, settings(), 1120.0).units[A0].hold == hold


def test_what_happened_while_nobody_looked_is_no_wish() -> None:
    """A boot or a restart of everything is not a manual stop of each worker; a failure is a failure."""
    kept = {Key(n, "a"): UnitMemory(state="active", since=0.0) for n in range(3)}
    kept[A0] = replace(kept[A0], hold="started", hold_until=2000.0)
    now = [Instance(key=A0), Instance(key=Key(1, "a")), Instance(key=Key(2, "a"), state="failed")]
    units = remember(observe(now), adopt(kept, now), settings(), 1000.0).units
    assert [unit.hold for unit in units.values()] == ["started", "", ""]
    assert [unit.failures for unit in units.values()] == [0, 0, 1]


@pytest.mark.parametrize(("before", "hold"), [("active", ""), ("deactivating", "stopped")])
def test_a_drain_that_began_while_nobody_looked_is_no_wish(before: UnitState, hold: Hold) -> None:
    """Its end is seen. One that the watcher before saw begin was asked for by hand."""
    drains = Instance(key=A0, state="deactivating", since=900.0)
    units = adopt({A0: UnitMemory(state=before, since=890.0)}, [drains])
    for one, now in ((drains, 1000.0), (replace(drains, state="inactive"), 1100.0)):
        units = remember(observe([one]), units, settings(), now).units
    assert units[A0].hold == hold


def test_instances_that_are_gone_are_forgotten() -> None:
    """No memory grows with GPUs that are not there any more."""
    world = World.of(keys(3))
    watcher = Watcher(world, settings())
    watcher.run(2)
    del world.instances[A0]
    watcher.run(1)
    assert set(watcher.history.units) == set(world.instances)


def test_a_driver_that_fails_for_a_moment_takes_no_memory_away() -> None:
    """What was stopped by hand is still stopped by hand when its GPU is listed again."""
    world = busy_world(2)
    watcher = Watcher(world, settings())
    watcher.run(30)
    world.set(A0, state="inactive", since=world.now)
    watcher.run(1)
    gone = world.instances.pop(A0)
    watcher.run(5)
    world.instances[A0] = gone
    watcher.run(5)
    assert A0 not in world.running


def test_the_start_up_time_is_measured() -> None:
    """The time from activating to active, as a running mean."""
    world = busy_world(1)
    world.startup_s = 7.0
    watcher = Watcher(world, settings())
    watcher.run(20)
    assert watcher.measured.rates.startup_s == 7.0


def test_an_instance_that_is_not_ours_is_out_as_its_watcher_says() -> None:
    """The other host's watcher knows better; its word is taken."""
    world = busy_world(0)
    world.instances = {Key(0, "b"): Instance(key=Key(0, "b"), excluded="in quarantine")}
    seen = world.see("a", ["b"])
    assert Watcher(world, settings(), "a").decide(seen).actions == ()
