# SPDX-License-Identifier: Apache-2.0
"""What is remembered of each of our instances: who started it, how often it failed, how long it is excluded.

Manual starts and stops are told from ours by our own commands: a change of state that follows no
command of ours was somebody's wish, and is respected for ``manual_hold_s``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.rates import MAX_GAP
from gpuinfer.watcher.state import (
    Action,
    Hold,
    Instance,
    Key,
    Observation,
    UnitState,
    Verb,
)

#: A start after which it is inactive at this many looks in a row had no effect.
TRIES = 2
#: After this many failed starts in a row we stop systemd from trying again: the instance cools down.
FAILED_STARTS = 2
#: A change of state is the answer to our command for this long after it.
COMMAND_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitMemory:
    """One instance, as it was at the last look."""

    state: UnitState
    since: float
    verb: Verb | None = None
    verb_at: float = 0.0
    #: At how many looks in a row it was told to start.
    tries: int = 0
    hold: Hold = ""
    hold_until: float = 0.0
    failures: int = 0
    quarantined_until: float = 0.0
    why: str = ""
    #: How often it had been restarted by itself, whether it has served since then, and for how many restarts
    #: in a row it has not.
    restarts: int = 0
    served: bool = False
    failed_starts: int = 0

    @property
    def notable(self) -> bool:
        """Tell whether anything but its state is remembered."""
        return bool(self.failures or self.hold)

    def held(self, now: float) -> Hold:
        """Return what an administrator did that still counts: the time of a start begins when it serves."""
        loads = self.hold == "started" and self.state == "activating" and not self.failed_starts
        return self.hold if loads or now < self.hold_until else ""

    def cooling_down(self, now: float) -> str:
        """Say why it cools down, empty when it does not."""
        return self.why if self.quarantined(now) else ""

    def quarantined(self, now: float) -> bool:
        """Tell whether it still cools down after a failure."""
        return now < self.quarantined_until


@dataclass(frozen=True, slots=True)
class Remembered:
    """The memory after a look, and what the look has shown."""

    units: Mapping[Key, UnitMemory]
    #: What served after a start, and how many seconds that took.
    startups: list[tuple[Serves, float]]


def remember(
    seen: Observation, units: Mapping[Key, UnitMemory], settings: WatcherSettings, now: float
) -> Remembered:
    """Take a look into the memory of our own instances; forget those that are gone, except what
    matters when they come back."""
    changed: dict[Key, UnitMemory] = {}
    startups: list[tuple[Serves, float]] = []
    ours = 0
    for instance in seen.instances:
        key = instance.key
        if not seen.owns(key):
            continue
        ours += 1
        before = units.get(key)
        if before is None:
            changed[key] = _failed(_first(instance), instance, settings, now)
        elif (
            before.state != instance.state
            or before.failures
            or before.restarts != instance.restarts
            or before.tries
            or instance.gpu.fault
        ):
            changed[key] = _changed(before, instance, settings, now)
            if before.state == "activating" and instance.state == "active":
                startups.append((instance.serves, max(0.0, instance.since - before.since)))
    after = {**units, **changed} if changed else units
    if (
        len(after) != ours
    ):  # a GPU may come back with its driver: what was done by hand, and failures, are kept
        present = {instance.key for instance in seen.instances}
        after = {key: unit for key, unit in after.items() if key in present or unit.notable}
    return Remembered(after, startups)


def _first(instance: Instance) -> UnitMemory:
    return _as_it_is(UnitMemory(state=instance.state, since=instance.since), instance)


def _as_it_is(unit: UnitMemory, instance: Instance) -> UnitMemory:
    """Take over what the unit is now, as if nothing had happened before."""
    return replace(
        unit,
        state=instance.state,
        since=instance.since,
        restarts=instance.restarts,
        served=instance.state == "active",
        failed_starts=0,
    )


def _changed(before: UnitMemory, instance: Instance, settings: WatcherSettings, now: float) -> UnitMemory:
    after = before
    if before.state != instance.state:
        after = replace(after, state=instance.state, since=instance.since)
        wish = _wish(before, instance, now)
        serves = before.held(now) == "started" and before.state == "activating" and instance.state == "active"
        if wish or serves:
            after = replace(after, hold=wish or "started", hold_until=now + settings.manual_hold_s)
        elif now >= before.hold_until:
            after = replace(after, hold="")
    after = _failed(after, instance, settings, now, was=before.state)
    if after.tries:
        after = _tried(after, instance, settings, now)
    return _restarted(after, instance, settings, now)


def _tried(unit: UnitMemory, instance: Instance, settings: WatcherSettings, now: float) -> UnitMemory:
    """Count it as a failure when nothing came of a start: a condition is not met, or it ended at once.

    It would be the first to be asked for ever, and no other one would.
    """
    if instance.state != "inactive" or now - unit.verb_at > MAX_GAP * settings.probe_interval_s:
        return replace(unit, tries=0)
    if unit.tries < TRIES or instance.queued:
        return unit
    return _cool_down(replace(unit, tries=0), "it was told to start, and nothing came of it", settings, now)


def _restarted(unit: UnitMemory, instance: Instance, settings: WatcherSettings, now: float) -> UnitMemory:
    """Count it as a failure when systemd had to try again what has never been ready.

    systemd tries ten times before it calls a unit failed; all that time it would count as one that starts.
    The first restart after a time of service is no failed start. While it cools down, one failure is enough.
    """
    tried = instance.restarts - unit.restarts
    more = max(0, tried - (1 if unit.served else 0))
    failed = more > 0 and not unit.quarantined(now)
    since = instance.since if tried and instance.state == "activating" else unit.since
    ended = instance.state in ("inactive", "failed")
    served = instance.state == "active" or (unit.served and tried == 0 and not ended)
    in_a_row = 0 if ended or instance.state == "active" else unit.failed_starts + more
    after = replace(unit, restarts=instance.restarts, served=served, since=since, failed_starts=in_a_row)
    why = "it does not come up, and systemd starts it again and again"
    return _cool_down(after, why, settings, now) if failed else after


def _wish(before: UnitMemory, instance: Instance, now: float) -> Hold:
    """Tell a start or stop that we did not ask for.

    Of one that goes down it is not known yet whether it stays there: after a restart or a crash it does
    not. And to drain may take long: what counts is when it began.
    """
    draining = before.state == "deactivating"
    began = before.since if draining else now
    ours = before.verb if began - before.verb_at <= COMMAND_S else None
    ran = before.state in ("active", "activating", "deactivating")
    if instance.runs and not ran and ours != "start":
        return "started"
    if ran and instance.state == "inactive" and ours != "stop":
        return "stopped"
    return ""


def adopt(units: Mapping[Key, UnitMemory], instances: Iterable[Instance]) -> Mapping[Key, UnitMemory]:
    """Return what the process before this one remembered, with the states there are now.

    What came and went while no watcher looked is nobody's wish: the host was booted, everything was restarted
    or upgraded. A failure still counts, and what root did before that is respected to its end.
    """
    there = {one.key: one for one in instances if one.state != "failed" and one.key in units}
    changed = {key: _as_it_is(units[key], one) for key, one in there.items()}
    return {**units, **changed}


def _failed(
    unit: UnitMemory, instance: Instance, settings: WatcherSettings, now: float, was: UnitState | None = None
) -> UnitMemory:
    """Count a failure and let it cool down, longer each time; forget all after long enough without one."""
    sick = f"its GPU is not well: {instance.gpu.fault}" if instance.gpu.fault else ""
    if instance.state == "failed" and was != "failed":
        # A GPU that is not well a moment before, or after, is why.
        return _cool_down(unit, sick or unit.cooling_down(now) or "its unit failed", settings, now)
    if sick:
        return replace(unit, why=sick) if unit.quarantined(now) else _cool_down(unit, sick, settings, now)
    forgotten = now - unit.quarantined_until > settings.quarantine_max_s
    return replace(unit, failures=0, why="") if unit.failures and forgotten else unit


def _cool_down(unit: UnitMemory, why: str, settings: WatcherSettings, now: float) -> UnitMemory:
    failures = unit.failures + 1
    pause = min(settings.quarantine_max_s, settings.quarantine_s * 2.0 ** min(failures - 1, 30))
    return replace(unit, failures=failures, quarantined_until=now + pause, why=why)


def commanded(
    units: Mapping[Key, UnitMemory], actions: list[Action], seen: Observation, now: float
) -> Mapping[Key, UnitMemory]:
    """Note our own commands, so that what follows is not taken for somebody else's."""
    ours = {a.key: _told(units[a.key], a.verb, now) for a in actions if seen.owns(a.key)} if seen.acts else {}
    return {**units, **ours} if ours else units


def _told(unit: UnitMemory, verb: Verb, now: float) -> UnitMemory:
    return replace(unit, verb=verb, verb_at=now, tries=unit.tries + 1 if verb == "start" else 0)


def refused(
    units: Mapping[Key, UnitMemory], key: Key, why: str, settings: WatcherSettings, now: float
) -> Mapping[Key, UnitMemory]:
    """Note that an instance cannot be started: it cools down, and others are started."""
    return {**units, key: replace(_cool_down(units[key], why, settings, now), tries=0)}


def why_excluded(instance: Instance, unit: UnitMemory | None, settings: WatcherSettings, now: float) -> str:
    """Say why an instance must not be started; empty when it may be."""
    if instance.masked:
        return "masked"
    if unit is None:
        return instance.excluded
    if instance.gpu.unknown:
        return instance.gpu.unknown
    if unit.quarantined(now):
        return f"in quarantine for {unit.quarantined_until - now:.0f} s: {unit.why}"
    if instance.gpu.fault:
        return f"its GPU is not well: {instance.gpu.fault}"
    if instance.gpu.hot:
        return f"its GPU is too hot: {instance.gpu.hot}"
    if unit.held(now) == "stopped":
        return "stopped by hand"
    if instance.gpu.foreign_bytes > settings.foreign_mb * 1024 * 1024:
        return f"other programs hold {instance.gpu.foreign_bytes // 2**20} MiB of its GPU"
    return ""
