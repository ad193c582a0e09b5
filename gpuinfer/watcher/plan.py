# SPDX-License-Identifier: Apache-2.0
"""Which instances to start and stop: always in the same order, so that many watchers make one plan.

Every watcher plans for all instances of the fleet, then carries out its own host's part. The first instances
of a fixed order that do not run are started: a watcher whose view is a moment old picks the same ones as the
others, so nothing is started twice. The last of the order are surplus, idle or not: a watcher that does not
know yet that the last one was stopped, or is busy, does not stop one of its own instead.

Where groups share lanes, the demand with the fewest groups is met first: what is started for it counts for
the wider ones too. Of several groups that could help, the one that serves the fewest lanes is started first,
so that the others stay free for what they alone serve. No more are started than their own lanes could use. A
worker is stopped when no demand that it serves needs it, and each is certain to be served without it
(``load``); or when all of its own lanes together do not need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpuinfer.queue.fleet import Serves
from gpuinfer.watcher.fleet import Fleet, Standing
from gpuinfer.watcher.load import Demand
from gpuinfer.watcher.state import Action, Key, Need


@dataclass(frozen=True, slots=True)
class Ask:
    """What one demand asks for, and how many of its workers it has not needed for a whole cooldown."""

    demand: Demand
    need: Need
    surplus: int
    #: How many it does not need even if its workers first serve all other work that they may claim before it;
    #: None: there is no such work.
    certain: int | None = None


@dataclass(slots=True)
class _Margin:
    """How many of a demand's workers may be stopped while it is still certain to be served."""

    demand: Demand
    #: Workers beyond those that it and all work claimed before it need; None: there is no such work.
    before: int | None
    #: Dedicated workers beyond those that it needs; below zero: there are too few.
    dedicated: int

    def spares(self, group: Serves) -> bool:
        """Tell whether one of a group may be stopped."""
        return self.before is None or self.before > 0 or self.dedicated >= (group in self.demand.dedicated)

    def stop(self, group: Serves) -> None:
        """Count one that is stopped."""
        if self.before is not None:
            self.before -= 1
        self.dedicated -= group in self.demand.dedicated


class Plan:
    """The plan for one part of the fleet."""

    def __init__(
        self,
        fleets: Mapping[Serves, Fleet],
        asks: Sequence[Ask],
        *,
        alone: Mapping[Serves, Ask],
        least: int = 0,
        room: int | None = None,
    ) -> None:
        """``asks``: the narrowest demand first, the whole part last.

        ``alone``: where there are several groups, what each would be asked for without the others; it could
        not use more. ``least``: how many run whatever they serve. ``room``: the most that may be started;
        None: any number.
        """
        self._fleets = fleets
        self._asks = asks
        self._alone = alone
        self._least = least
        self._planned: Counter[Serves] = Counter()
        self._narrow_first = sorted(fleets, key=lambda group: (_breadth(group, asks[-1].demand), group))
        self.actions: list[Action] = []
        for group, fleet in fleets.items():
            enabled = _startable(fleet, "ready", "failed", enabled=True)
            self.actions += [Action("start", key, "is enabled") for key in enabled]
            self._planned[group] = len(enabled)
        self._room = None if room is None else max(0, room - len(self.actions))
        #: What is left to start, and what has failed before.
        self._idle = {group: _startable(fleet, "ready") for group, fleet in fleets.items()}
        self._failed = {group: _startable(fleet, "failed") for group, fleet in fleets.items()}
        self.short = False
        #: A demand that might not be served with fewer workers, although more than desired run.
        self.kept_for: Demand | None = None
        for ask in asks:
            self._fill(ask)
        self.starts = bool(self.actions)

    @property
    def ends(self) -> list[Action]:
        """Return the stops of instances whose starts keep failing."""
        failing = [one for fleet in self._fleets.values() for one in fleet.of("failing") if one.stoppable]
        return [
            Action("stop", one.key, str(one.exclusion)) for one in sorted(failing, key=lambda one: one.key)
        ]

    def _running(self, group: Serves) -> int:
        return self._fleets[group].running + self._planned[group]

    def _fill(self, ask: Ask) -> None:
        """Start what is missing; instances that failed before come last."""
        running = sum(map(self._running, ask.demand.groups))
        missing = ask.need.desired - running
        if missing <= 0:
            return
        self.short = True
        why = f"{ask.need.desired} desired, {running} run"
        groups = [group for group in self._narrow_first if group in ask.demand.groups]
        missing -= self._take(missing, groups, why)
        # Workers of the floor run whatever the load: prefer those that serve the most lanes.
        floor = min(missing, self._least - sum(map(self._running, groups)))
        if floor > 0:
            self._take(floor, groups[::-1], why, any_use=True)

    def _take(self, missing: int, groups: Sequence[Serves], why: str, *, any_use: bool = False) -> int:
        taken = 0
        for pools, reason in (
            (self._idle, why),
            (self._failed, f"its quarantine is over; {why}"),
        ):
            for group in groups:
                number = min(missing - taken, missing if any_use else self._use(group, missing))
                number = number if self._room is None else min(number, self._room)
                keys, pools[group] = pools[group][: max(0, number)], pools[group][max(0, number) :]
                self.actions += [Action("start", key, reason) for key in keys]
                self._planned[group] += len(keys)
                taken += len(keys)
                if self._room is not None:
                    self._room -= len(keys)
        return taken

    def _use(self, group: Serves, missing: int) -> int:
        ask = self._alone.get(group)
        return missing if ask is None else max(0, ask.need.desired - self._running(group))

    def stops(self) -> list[Action]:
        """Stop the last of the order that are not needed, each when it is idle."""
        # A silent worker may be gone already, and is not counted on.
        left = [ask.surplus - self._silent(ask.demand.groups) for ask in self._asks]
        sure = [self._margin(ask) for ask in self._asks]
        free = {group: self._too_many_alone(group) for group in self._alone}
        if left[-1] <= 0 and not any(number > 0 for number in free.values()):
            return []
        running = sum(fleet.running for fleet in self._fleets.values())
        stay = running - self._silent(self._fleets)
        above = stay - self._least
        why = f"{stay - max(left[-1], 0)} desired, {running} run"
        spare = [
            (one, group) for group, fleet in self._fleets.items() for one in fleet.counted if not one.stays
        ]
        actions = []
        for one, group in sorted(spare, key=lambda pair: pair[0].key, reverse=True):
            serving = [place for place, ask in enumerate(self._asks) if group in ask.demand.groups]
            surplus = not self.short and not self.starts and all(left[place] > 0 for place in serving)
            unsure = [self._asks[place].demand for place in serving if not sure[place].spares(group)]
            shared = surplus and not unsure
            alone = free.get(group, 0) > 0 and above > 0
            if surplus and unsure and self.kept_for is None:
                self.kept_for = unsure[0]
            if not shared and not alone:
                continue
            above -= 1
            for place in serving:
                left[place] -= 1
                sure[place].stop(group)
            if group in free:
                free[group] -= 1
            if one.stoppable:
                reason = why if shared else f"{group} has more than it can use"
                actions.append(Action("stop", one.key, reason))
        return actions

    def _margin(self, ask: Ask) -> _Margin:
        silent = self._silent(ask.demand.groups)
        others = sum(self._running(group) for group in ask.demand.groups - ask.demand.dedicated)
        before = None if ask.certain is None else ask.certain - silent
        return _Margin(ask.demand, before, ask.surplus - silent - others)

    def _too_many_alone(self, group: Serves) -> int:
        """Return how many of a group its lanes would not need even if no other group served them."""
        ask, running = self._alone[group], self._fleets[group].running
        busy = self._planned[group] or ask.need.desired > running
        return 0 if busy else ask.surplus - self._silent([group])

    def _silent(self, groups: Iterable[Serves]) -> int:
        return sum(self._fleets[group].silent for group in groups)


def _startable(fleet: Fleet, *standings: Standing, enabled: bool = False) -> list[Key]:
    """Return the instances to start, in their order: those that are enabled, or the others."""
    return sorted(one.key for one in fleet.of(*standings) if one.instance.enabled == enabled)


def one_a_host(stops: Sequence[Action]) -> list[Action]:
    """Return the first stop of each host."""
    first: dict[str, Action] = {}
    for action in stops:
        first.setdefault(action.key.host, action)
    return list(first.values())


def _breadth(group: Serves, whole: Demand) -> int:
    return sum(group.covers(lane) for lane in whole.lanes)
