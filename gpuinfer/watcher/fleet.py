# SPDX-License-Identifier: Apache-2.0
"""The instances at one probe: the standing of each, and counts for those that serve the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.memory import FAILED_STARTS, UnitMemory, exclusion
from gpuinfer.watcher.state import Exclusion, Instance, Key, Observation

#: Do not stop a worker before it has been ready for this many probes: it had no time to claim anything.
SETTLED_PROBES = 2

#: - serving: ready for tasks; silent: active, as another host's watcher says, but without a heartbeat
#: - starting; failing: systemd tries again to start it, and it is not counted on
#: - stopping: it drains
#: - ready: may be started; failed: may be started again, after those that are ready
#: - excluded: must not be started, or claims nothing
Standing = Literal["serving", "silent", "starting", "failing", "stopping", "ready", "failed", "excluded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One instance and its standing."""

    instance: Instance
    standing: Standing
    #: Why it must not be started, or is not counted on.
    exclusion: Exclusion | None = None
    #: Why it is never stopped for lack of work; empty: it may be.
    stays: str = ""
    #: It may be stopped now: idle for more than a moment, or failing for good.
    stoppable: bool = False

    @property
    def key(self) -> Key:
        """Return the instance's key."""
        return self.instance.key


@dataclass(frozen=True)
class Fleet:
    """The instances that serve the same, or several such groups together."""

    members: tuple[Member, ...] = ()

    def of(self, *standings: Standing) -> list[Member]:
        """Return the members of these standings."""
        return [member for member in self.members if member.standing in standings]

    @cached_property
    def active(self) -> int:
        """Return how many serve."""
        return len(self.of("serving", "silent"))

    @cached_property
    def silent(self) -> int:
        """Return how many of them send no heartbeat."""
        return len(self.of("silent"))

    @cached_property
    def starting(self) -> Counter[float]:
        """Return how many have been starting, by when they began."""
        return Counter(member.instance.since for member in self.of("starting"))

    @cached_property
    def running(self) -> int:
        """Return how many serve or are about to."""
        return self.active + self.starting.total()

    @cached_property
    def possible(self) -> int:
        """Return how many could run."""
        return self.running + len(self.of("ready", "failed"))

    @cached_property
    def all_busy(self) -> bool:
        """Tell whether no active worker is known to be idle."""
        return all(member.instance.busy is True for member in self.of("serving", "silent"))

    @cached_property
    def counted(self) -> list[Member]:
        """Return those that run, except the silent ones."""
        return self.of("serving", "starting")

    @cached_property
    def excluded(self) -> dict[Key, Exclusion]:
        """Return the excluded instances, and why."""
        return {member.key: member.exclusion for member in self.members if member.exclusion is not None}

    @cached_property
    def returning(self) -> bool:
        """Tell whether any can soon be started without help: it drains, or its exclusion ends by itself."""
        drains = any(not member.instance.masked for member in self.of("stopping"))
        return drains or any(one.ends for one in self.excluded.values())


def joined(fleets: Iterable[Fleet]) -> Fleet:
    """Return several fleets as one."""
    return Fleet(tuple(member for fleet in fleets for member in fleet.members))


def grouped(
    seen: Observation, units: Mapping[Key, UnitMemory], settings: WatcherSettings, now: float
) -> dict[Serves, Fleet]:
    """Return the instances as a fleet for each group that serves the same."""
    found: dict[Serves, list[Member]] = {}
    for one in seen.instances:
        found.setdefault(one.serves, []).append(classify(one, units.get(one.key), seen, settings, now))
    return {serves: Fleet(tuple(members)) for serves, members in found.items()}


def classify(
    instance: Instance, unit: UnitMemory | None, seen: Observation, settings: WatcherSettings, now: float
) -> Member:
    """Return an instance with its standing."""
    standing, why = _standing(instance, unit, seen, settings, now)
    hold = instance.hold if unit is None else unit.held(now)
    by_hand = "was started by hand" if hold == "started" else ""
    logs = "belongs to a watcher that only logs" if instance.log_only else ""
    stays = "is enabled" if instance.enabled else by_hand or logs
    settled = now - instance.since >= SETTLED_PROBES * settings.probe_interval_s
    idle = standing == "serving" and settled and instance.busy is False and seen.alive(instance.key)
    hopeless = standing == "failing" and unit is not None and unit.failed_starts >= FAILED_STARTS
    stoppable = not stays and (idle or hopeless)
    return Member(instance=instance, standing=standing, exclusion=why, stays=stays, stoppable=stoppable)


def _standing(
    instance: Instance, unit: UnitMemory | None, seen: Observation, settings: WatcherSettings, now: float
) -> tuple[Standing, Exclusion | None]:
    if instance.state == "active" and instance.drained:
        resume = f"until gpuinfer worker resume {instance.key.number}"
        return "excluded", Exclusion("drained", resume, ends=False)
    if instance.state == "active":
        silent = instance.busy is None and not seen.owns(instance.key)
        return "silent" if silent else "serving", None
    if instance.state == "deactivating":
        return "stopping", None
    if instance.state == "activating":
        # systemd may try once more, since the cause may pass within seconds; then it is stopped.
        failing = instance.told_exclusion if unit is None else unit.quarantine(now)
        return ("failing", failing) if failing else ("starting", None)
    why = exclusion(instance, unit, settings, now)
    if why is None and not seen.alive(instance.key):
        why = Exclusion("its host's watcher is silent", "until it answers", ends=False)
    if why is None and instance.log_only:
        why = Exclusion("its host's watcher only logs", "until watcher.decisions is act", ends=False)
    if why is not None:
        return "excluded", why
    return "failed" if instance.state == "failed" else "ready", None
