# SPDX-License-Identifier: Apache-2.0
"""The instances at one look, sorted by what they serve and by what may be done with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.memory import BY_HAND, FAILED_STARTS, UnitMemory, why_excluded
from gpuinfer.watcher.state import (
    Instance,
    Key,
    Observation,
)

#: A worker that has been ready for fewer probes has had no time to claim anything, and is not stopped.
SETTLED_LOOKS = 2


@dataclass(slots=True)
class Fleet:
    """The instances that serve the same, sorted by what may be done with them."""

    active: int = 0
    #: Since when -> how many have been starting since then.
    starting: Counter[float] = field(default_factory=Counter)
    #: How many of those that run are enabled.
    enabled: int = 0
    #: True while no active worker is known to be idle.
    all_busy: bool = True
    #: May be started; those that are enabled apart.
    idle: list[Key] = field(default_factory=list)
    enabled_idle: list[Key] = field(default_factory=list)
    #: Failed, and rested for long enough; those that are enabled apart.
    failed: list[Key] = field(default_factory=list)
    enabled_failed: list[Key] = field(default_factory=list)
    #: All that run, except those that send no heartbeat.
    serving: list[Instance] = field(default_factory=list)
    #: Running, and perhaps too many: neither enabled, nor started by hand, nor of a host that only logs.
    spare: list[Key] = field(default_factory=list)
    #: Of those, the ones that may be stopped now: active for more than a moment, and idle.
    stoppable: set[Key] = field(default_factory=set)
    #: How many others' instances are told to be active, and do not beat.
    silent: int = 0
    #: Starting, but not counted upon; ours to stop.
    broken: list[Key] = field(default_factory=list)
    #: Excluded instances, and why.
    excluded: dict[Key, str] = field(default_factory=dict)
    #: How many cannot be started now, and will be without anybody's help: they drain or cool down.
    returning: int = 0

    @property
    def running(self) -> int:
        """Return how many serve or are about to."""
        return self.active + self.starting.total()

    @property
    def possible(self) -> int:
        """Return how many could run."""
        waiting = (self.idle, self.enabled_idle, self.failed, self.enabled_failed)
        return self.running + sum(map(len, waiting))


def joined(fleets: Sequence[Fleet]) -> Fleet:
    """Return several fleets as one."""
    if len(fleets) == 1:
        return fleets[0]
    whole = Fleet()
    for one in fleets:
        whole.active += one.active
        whole.starting += one.starting
        whole.enabled += one.enabled
        whole.all_busy &= one.all_busy
        whole.silent += one.silent
        whole.returning += one.returning
        for name in ("idle", "enabled_idle", "failed", "enabled_failed", "serving", "broken"):
            getattr(whole, name).extend(getattr(one, name))
        whole.excluded |= one.excluded
    return whole


def count(
    seen: Observation, units: Mapping[Key, UnitMemory], settings: WatcherSettings, now: float
) -> dict[Serves, Fleet]:
    """Sort the instances, a fleet for each group. There may be ten thousand, once a second."""
    fleets: dict[Serves, Fleet] = {}
    serves: Serves | None = None
    fleet = Fleet()
    for instance in seen.instances:
        if instance.serves is not serves:
            serves = instance.serves
            fleet = fleets.setdefault(serves, Fleet())
        state = instance.state
        if state == "active" and instance.drained:
            fleet.excluded[instance.key] = f"drained, until gpuinfer worker resume {instance.key.number}"
        elif state == "active":
            fleet.active += 1
            fleet.enabled += instance.enabled
            if instance.busy is not True:
                fleet.all_busy = False
            if instance.busy is None and not seen.owns(instance.key):
                fleet.silent += 1
            else:
                fleet.serving.append(instance)
        elif state == "activating":
            _count_starting(fleet, instance, units.get(instance.key), seen, now)
        elif state == "deactivating":
            fleet.returning += not instance.masked
        else:
            unit = units.get(instance.key)
            if unit is None or unit.notable or instance.notable:
                _count_stopped(fleet, instance, unit, seen, settings, now)
            else:
                fleet.idle.append(instance.key)
    return fleets


def sort_spare(
    fleet: Fleet, seen: Observation, units: Mapping[Key, UnitMemory], settings: WatcherSettings, now: float
) -> None:
    """Sort those that run by whether they may be stopped, and now; looked at only when there are too many."""
    for instance in fleet.serving:
        if _may_stop(instance, units.get(instance.key), now):
            fleet.spare.append(instance.key)
            settled = now - instance.since >= SETTLED_LOOKS * settings.probe_interval_s
            ready = instance.state == "active" and settled
            if ready and instance.busy is False and seen.alive(instance.key):
                fleet.stoppable.add(instance.key)


def _may_stop(instance: Instance, unit: UnitMemory | None, now: float) -> bool:
    hold = instance.hold if unit is None else unit.held(now)
    return not instance.enabled and hold != "started" and not instance.log_only


def _count_starting(
    fleet: Fleet, instance: Instance, unit: UnitMemory | None, seen: Observation, now: float
) -> None:
    """Count what starts, except one that has failed to: it would hold up those that could.

    systemd may try once more, for what was wrong may pass within seconds; then it is stopped.
    """
    key = instance.key
    reason = instance.excluded if unit is None else unit.cooling_down(now)
    if not reason:
        fleet.enabled += instance.enabled
        fleet.starting[instance.since] += 1
        fleet.serving.append(instance)
        return
    fleet.excluded[key] = reason
    fleet.returning += 1
    hopeless = unit is not None and unit.failed_starts >= FAILED_STARTS
    if hopeless and _may_stop(instance, unit, now):
        fleet.broken.append(key)


def _count_stopped(
    fleet: Fleet,
    instance: Instance,
    unit: UnitMemory | None,
    seen: Observation,
    settings: WatcherSettings,
    now: float,
) -> None:
    key, enabled = instance.key, instance.enabled
    reason = why_excluded(instance, unit, settings, now)
    if not reason and not seen.alive(key):
        reason = "its host's watcher is silent"
    if not reason and instance.log_only:
        reason = "its host's watcher only logs"
    if reason:
        fleet.excluded[key] = reason
        fleet.returning += _returns(instance, unit, seen, now)
    elif instance.state == "failed":
        (fleet.enabled_failed if enabled else fleet.failed).append(key)
    else:
        (fleet.enabled_idle if enabled else fleet.idle).append(key)


def _returns(instance: Instance, unit: UnitMemory | None, seen: Observation, now: float) -> bool:
    """Tell whether an excluded instance comes back by itself: after its cooldown, or with its GPU."""
    hold = instance.hold if unit is None else unit.held(now)
    left_alone = instance.masked or instance.log_only or hold in BY_HAND
    return seen.alive(instance.key) and not left_alone
