# SPDX-License-Identifier: Apache-2.0
"""Which instances to start and stop: always in the same order, so that many watchers make one plan.

Every watcher sees all instances and plans for all of them, then carries out its own host's part.
A start goes to the first instances of a fixed order that do not run; a watcher whose view is a moment
old asks the same instances as the others, and so nothing is started twice. What is too many are the last
of the order, whether they are idle at that moment or not: a watcher that does not know yet that the last one
was stopped, or takes it for busy, stops none of its own instead.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gpuinfer.watcher.state import Action, Instance, Key, Need


@dataclass(slots=True)
class Fleet:
    """The instances at one look, sorted by what may be done with them."""

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
    #: All that run, but for those that do not beat.
    serving: list[Instance] = field(default_factory=list)
    #: Running, and perhaps too many: neither enabled, nor started by hand, nor of a host that only logs.
    spare: list[Key] = field(default_factory=list)
    #: Of those, the ones that may be stopped now: active for more than a moment, and idle.
    stoppable: set[Key] = field(default_factory=set)
    #: How many others' instances are told to be active, and do not beat.
    silent: int = 0
    #: Starting, but not counted upon; ours to stop.
    broken: list[Key] = field(default_factory=list)
    #: Instances that are out, and why.
    out: dict[Key, str] = field(default_factory=dict)

    @property
    def running(self) -> int:
        """Return how many serve or are about to."""
        return self.active + self.starting.total()

    @property
    def possible(self) -> int:
        """Return how many could run."""
        waiting = (self.idle, self.enabled_idle, self.failed, self.enabled_failed)
        return self.running + sum(map(len, waiting))


def plan(fleet: Fleet, need: Need, surplus: int) -> list[Action]:
    """Return what to do: enabled instances first, then what is wanted, else one idle stop a host.

    One that has failed is made ready again when nothing else is left; it starts at a later look. A start that
    failed again when systemd tried it again is stopped, and so rests.
    """
    ends = [Action("stop", key, fleet.out[key]) for key in sorted(fleet.broken)]
    actions = [Action("start", key, "is enabled") for key in sorted(fleet.enabled_idle)]
    actions += [Action("reset", key, "is enabled") for key in sorted(fleet.enabled_failed)]
    running = fleet.running + len(actions)
    if need.up <= running:
        return ends + (actions or _stops(fleet, surplus))
    why = f"{need.up} wanted, {running} run"
    first = sorted(fleet.idle)[: need.up - running]
    actions += [Action("start", key, why) for key in first]
    rested = sorted(fleet.failed)[: need.up - running - len(first)]
    actions += [Action("reset", key, f"has rested after its failure; {why}") for key in rested]
    return ends + actions


def _stops(fleet: Fleet, surplus: int) -> list[Action]:
    """Stop the last of the order, one instance a host at a time, each when it is idle."""
    surplus -= fleet.silent  # who does not beat may be gone already
    if surplus <= 0:
        return []
    stops: dict[str, Key] = {}
    for key in sorted(fleet.spare)[: -surplus - 1 : -1]:
        if key in fleet.stoppable:
            stops.setdefault(key.host, key)
    why = f"{fleet.running - fleet.silent - surplus} have been enough for long, {fleet.running} run"
    return [Action("stop", key, why) for key in stops.values()]
