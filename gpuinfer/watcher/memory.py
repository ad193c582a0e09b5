# SPDX-License-Identifier: Apache-2.0
"""What is remembered of each instance of this host: what was done to it by hand, and how often it failed.

A change of state that follows no command of ours was made by hand. A start by hand counts for
``manual_hold_s``. A stop by hand, or a change from enabled to disabled, counts until the instance is started
or enabled, or the host boots. An instance that was never enabled is started on demand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.rates import MAX_GAP
from gpuinfer.watcher.state import Action, Exclusion, Hold, Instance, Key, Observation, UnitState, Verb

#: A start had no effect when the instance is inactive at this many probes in a row.
TRIES = 2
#: Stop an instance after this many failed starts in a row: systemd would go on trying.
FAILED_STARTS = 2
#: For this long after a command of ours, a change of state is its effect.
COMMAND_S = 30.0
#: What was done by hand, and keeps an instance from being started.
BY_HAND = ("stopped", "disabled")
_RAN = ("active", "activating", "deactivating")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitMemory:
    """One instance, as it was at the last probe."""

    state: UnitState
    since: float
    enabled: bool = False
    verb: Verb | None = None
    verb_at: float = 0.0
    #: How many probes in a row have told it to start.
    tries: int = 0
    hold: Hold = ""
    #: Until when a start by hand counts.
    hold_until: float = 0.0
    failures: int = 0
    quarantined_until: float = 0.0
    why: str = ""
    #: How often systemd had restarted it, whether it has served since the last time, and after how many
    #: restarts in a row it has not.
    restarts: int = 0
    served: bool = False
    failed_starts: int = 0

    def held(self, now: float) -> Hold:
        """Return what was done by hand and still counts. The time of a start begins when it serves."""
        if self.hold != "started":
            return self.hold
        loads = self.state == "activating" and not self.failed_starts
        return self.hold if loads or now < self.hold_until else ""

    def quarantine(self, now: float) -> Exclusion | None:
        """Return its quarantine after a failure, if that still lasts."""
        left_s = self.quarantined_until - now
        if left_s <= 0:
            return None
        times = f" after {self.failures} failures" if self.failures > 1 else ""
        return Exclusion("in quarantine", f"for {left_s:.0f} s more", cause=f"{times}: {self.why}")


@dataclass(frozen=True, slots=True)
class Remembered:
    """The memory after a probe, and the starts that ended in it."""

    units: Mapping[Key, UnitMemory]
    #: What each one serves that became ready, and how many seconds its start took.
    startups: list[tuple[Serves, float]]


def remember(
    seen: Observation, units: Mapping[Key, UnitMemory], settings: WatcherSettings, now: float
) -> Remembered:
    """Return the memory of our own instances after a probe.

    Of instances that are gone, keep holds and failures: one may return, as after a failure of its driver.
    """
    present: dict[Key, UnitMemory] = {}
    startups: list[tuple[Serves, float]] = []
    for instance in seen.instances:
        key = instance.key
        if not seen.owns(key):
            continue
        before = units.get(key)
        if before is None:
            present[key] = _failed(_as_it_is(None, instance), instance, settings, now)
        elif instance.queued and instance.state == "inactive" and before.state in _RAN:
            present[key] = before  # between the two halves of a restart
        else:
            present[key] = _changed(before, instance, settings, now)
            if before.state == "activating" and instance.state == "active":
                startups.append((instance.serves, max(0.0, instance.since - before.since)))
    gone = {key: unit for key, unit in units.items() if (unit.failures or unit.hold) and key not in present}
    after = present | gone
    return Remembered(units if after == units else after, startups)


def _as_it_is(unit: UnitMemory | None, instance: Instance) -> UnitMemory:
    """Return the memory of an instance as it is now, as if nothing had happened before."""
    return replace(
        unit or UnitMemory(state=instance.state, since=instance.since),
        state=instance.state,
        since=instance.since,
        enabled=instance.enabled,
        restarts=instance.restarts,
        served=instance.state == "active",
        failed_starts=0,
    )


def _changed(before: UnitMemory, instance: Instance, settings: WatcherSettings, now: float) -> UnitMemory:
    moved = before.state != instance.state
    since = instance.since if moved else before.since
    if instance.ready_at > before.since:  # it may have ended again between two probes
        before = replace(before, served=True)
    if moved and instance.target_stopped and not instance.runs:  # a stop of all workers
        before = replace(before, verb="stop", verb_at=now)
    after = replace(before, state=instance.state, since=since, hold=before.held(now))
    wish = _wish(before, instance, now) if moved else ""
    serves = after.hold == "started" and before.state == "activating" and instance.state == "active"
    if wish or serves:
        after = replace(after, hold=wish or "started", hold_until=now + settings.manual_hold_s)
    after = _enabled(after, instance)
    after = _failed(after, instance, settings, now, was=before.state)
    if after.tries:
        after = _tried(after, instance, settings, now)
    return _restarted(after, instance, settings, now)


def _enabled(unit: UnitMemory, instance: Instance) -> UnitMemory:
    """Note a change from enabled to disabled; the change to enabled ends whatever was done by hand."""
    if instance.enabled == unit.enabled:
        return unit
    return replace(unit, enabled=instance.enabled, hold="" if instance.enabled else "disabled")


def _tried(unit: UnitMemory, instance: Instance, settings: WatcherSettings, now: float) -> UnitMemory:
    """Count a start without effect as a failure: a condition is not met, or the worker ended at once.

    Otherwise this instance would be started again and again, and no other one ever.
    """
    if instance.state != "inactive" or now - unit.verb_at > MAX_GAP * settings.probe_interval_s:
        return replace(unit, tries=0)
    if unit.tries < TRIES or instance.queued:
        return unit
    return _quarantined(replace(unit, tries=0), "a start had no effect", settings, now)


def _restarted(unit: UnitMemory, instance: Instance, settings: WatcherSettings, now: float) -> UnitMemory:
    """Count a failure when systemd restarts an instance that was never ready.

    systemd tries ten times before it calls a unit failed; meanwhile the instance would count as starting. The
    first restart of one that has served is no failed start. Within a quarantine only one failure counts.
    """
    tried = instance.restarts - unit.restarts
    more = max(0, tried - (1 if unit.served else 0))
    failed = more > 0 and unit.quarantine(now) is None
    since = instance.since if tried and instance.state == "activating" else unit.since
    ended = instance.state in ("inactive", "failed")
    served = instance.state == "active" or (unit.served and tried <= 0 and not ended)
    in_a_row = 0 if ended or instance.state == "active" else unit.failed_starts + more
    after = replace(unit, restarts=instance.restarts, served=served, since=since, failed_starts=in_a_row)
    why = "its starts fail, and systemd starts it again and again"
    return _quarantined(after, why, settings, now) if failed else after


def _wish(before: UnitMemory, instance: Instance, now: float) -> Hold:
    """Recognise a start or a stop that was not ours.

    An instance that is deactivating may come back, after a restart or a crash. A drain may take long: what
    counts is when it began. A stop of a masked instance is no hold: it ends with the mask.
    """
    began = before.since if before.state == "deactivating" else now
    ours = before.verb if began - before.verb_at <= COMMAND_S else None
    ran = before.state in _RAN
    if instance.runs and not ran and ours != "start":
        return "started"
    stopped = ran and instance.state == "inactive" and ours != "stop"
    return "stopped" if stopped and not instance.masked else ""


def adopt(units: Mapping[Key, UnitMemory], instances: Iterable[Instance]) -> Mapping[Key, UnitMemory]:
    """Return the memory of the previous process with the current states.

    A start or stop between the two processes was not made by hand: all was restarted or upgraded. That holds
    for a stop that is still under way, if the previous process did not see it begin. Failures still count,
    and so do earlier holds, except the stop of an instance that runs now.
    """
    changed = {}
    for one in instances:
        if one.key in units and one.state != "failed":
            unit = _enabled(units[one.key], one)
            if one.state == "deactivating" and unit.state != "deactivating":
                unit = replace(unit, verb="stop", verb_at=one.since)
            started = unit.hold == "stopped" and one.runs
            changed[one.key] = _as_it_is(replace(unit, hold="") if started else unit, one)
    return {**units, **changed}


def booted(units: Mapping[Key, UnitMemory]) -> Mapping[Key, UnitMemory]:
    """Return the memory after a boot, which ends whatever was done by hand."""
    return {key: replace(unit, hold="", enabled=False) for key, unit in units.items()}


def _failed(
    unit: UnitMemory, instance: Instance, settings: WatcherSettings, now: float, was: UnitState | None = None
) -> UnitMemory:
    """Count a failure, and quarantine the instance, longer each time; forget old failures."""
    sick = f"its GPU is not healthy ({instance.gpu.fault})" if instance.gpu.fault else ""
    if instance.state == "failed" and was != "failed":
        # A fault of its GPU at about that time is the cause.
        why = sick or (unit.why if unit.quarantine(now) else "its unit failed")
        return _quarantined(unit, why, settings, now)
    if sick:
        return replace(unit, why=sick) if unit.quarantine(now) else _quarantined(unit, sick, settings, now)
    forgotten = now - unit.quarantined_until > settings.quarantine_max_s
    return replace(unit, failures=0, why="") if unit.failures and forgotten else unit


def _quarantined(unit: UnitMemory, why: str, settings: WatcherSettings, now: float) -> UnitMemory:
    failures = unit.failures + 1
    pause = min(settings.quarantine_max_s, settings.quarantine_s * 2.0 ** min(failures - 1, 30))
    return replace(unit, failures=failures, quarantined_until=now + pause, why=why)


def commanded(
    units: Mapping[Key, UnitMemory], actions: list[Action], seen: Observation, now: float
) -> Mapping[Key, UnitMemory]:
    """Record our own commands, so that their effect is not taken for a start or stop by hand."""
    ours = {a.key: _told(units[a.key], a.verb, now) for a in actions if seen.owns(a.key)} if seen.acts else {}
    return {**units, **ours} if ours else units


def undone(units: Mapping[Key, UnitMemory], started: Iterable[Key], now: float) -> Mapping[Key, UnitMemory]:
    """Record that what we have started is stopped again."""
    return {**units, **{key: _told(units[key], "stop", now) for key in started if key in units}}


def _told(unit: UnitMemory, verb: Verb, now: float) -> UnitMemory:
    return replace(unit, verb=verb, verb_at=now, tries=unit.tries + 1 if verb == "start" else 0)


def refused(
    units: Mapping[Key, UnitMemory], key: Key, why: str, settings: WatcherSettings, now: float
) -> Mapping[Key, UnitMemory]:
    """Record that an instance cannot be started: it is quarantined, and others are started."""
    return {**units, key: replace(_quarantined(units[key], why, settings, now), tries=0)}


def exclusion(
    instance: Instance, unit: UnitMemory | None, settings: WatcherSettings, now: float
) -> Exclusion | None:
    """Say why an instance must not be started, and for how long; None when it may be."""
    gpu, limit_mib = instance.gpu, settings.foreign_mb
    if instance.masked:
        return Exclusion("masked", "until it is unmasked", ends=False)
    if unit is None:
        return instance.told_exclusion
    if instance.target_stopped:
        return Exclusion(
            "gpuinfer-workers.target is stopped", "until it is started, or the host boots", ends=False
        )
    if gpu.unknown:
        return Exclusion(gpu.unknown, "until it does")
    if quarantine := unit.quarantine(now):
        return quarantine
    if gpu.fault:
        return Exclusion(f"its GPU is not healthy ({gpu.fault})", "until that has passed")
    if gpu.hot:
        return Exclusion(f"its GPU is too hot: {gpu.hot}", "until that has passed")
    if unit.held(now) in BY_HAND:
        return Exclusion(
            f"{unit.hold} by hand", "until it is started or enabled, or the host boots", ends=False
        )
    if gpu.foreign_bytes > limit_mib * 2**20:
        held = f"other programs hold {gpu.foreign_bytes // 2**20} MiB of its GPU"
        return Exclusion(held, f"until they hold {limit_mib} MiB at most")
    return None
