# SPDX-License-Identifier: Apache-2.0
"""One part of the fleet at one look: measured, asked what it needs, planned for, and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.calm import Calm
from gpuinfer.watcher.fleet import Fleet, joined, sort_spare
from gpuinfer.watcher.load import Demand, Load, Part, load_of
from gpuinfer.watcher.memory import UnitMemory
from gpuinfer.watcher.need import Bounds, need_of
from gpuinfer.watcher.plan import Ask, Plan
from gpuinfer.watcher.rates import Rates, measure, with_startups
from gpuinfer.watcher.state import (
    Action,
    Key,
    Need,
    Observation,
    Verdict,
)

#: Log at most this many lanes that keep a worker.
NAMED_LANES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known of one demand."""

    rates: Rates = field(default_factory=Rates)
    calm: Calm = field(default_factory=Calm)


@dataclass(slots=True)
class _Asking:
    """One demand at this look."""

    demand: Demand
    fleet: Fleet
    load: Load
    #: What is remembered of it, and what is decided from: service and start-up of the whole part.
    own: Rates
    used: Rates
    calm: Calm
    need: Need | None = None
    surplus: int = 0

    def ask(self, bounds: Bounds, settings: WatcherSettings, now: float) -> Ask:
        """Say what is needed, and how many have been too many for long."""
        need = self.need = need_of(self.load, self.fleet, self.used, self.calm, settings, now, bounds)
        self.calm, surplus = self.calm.look(self.fleet.running, need, settings, now)
        self.surplus = min(surplus, self.fleet.running - need.keep)
        return Ask(self.demand, need, self.surplus)


class Look:
    """A part of the fleet at one look."""

    def __init__(
        self,
        part: Part,
        seen: Observation,
        before: Mapping[str, Measured],
        fleets: Mapping[Serves, Fleet],
        startups: Sequence[tuple[Serves, float]],
        settings: WatcherSettings,
        now: float,
    ) -> None:
        """Measure. ``before``: what is remembered of demands, by name."""
        self.part = part
        self._seen = seen
        self._settings = settings
        self._now = now
        self._fleets = {group: fleets[group] for group in sorted(part.whole.groups)}
        times = [seconds for group, seconds in startups if group in part.whole.groups]
        told = [figures[part.name] for figures in seen.figures.values() if part.name in figures]
        known = before.get(part.name, Measured())
        self._whole = self._measure(part.whole, replace(known, rates=with_startups(known.rates, times)))
        self._whole.used = self._whole.own.pooled(told)
        self._within = [self._measure(one, before.get(one.name, Measured())) for one in part.within]
        self._before = [
            same if one is same.demand else self._measure(one, before.get(one.name, Measured()))
            for one, same in zip(part.before, self._within, strict=True)
        ]
        self._alone = [self._measure(one, before.get(one.name, Measured())) for one in part.alone]
        self._plan: Plan | None = None
        self._stops: list[Action] = []

    def _measure(self, demand: Demand, before: Measured) -> _Asking:
        fleet = joined([self._fleets[group] for group in sorted(demand.groups)])
        load = load_of(demand.lanes, self._seen.queues or {}, demand.groups, self._seen.held)
        own = measure(before.rates, load, fleet.active, fleet.all_busy, self._settings, self._now)
        used = own
        if demand is not self.part.whole:
            shared = self._whole.used
            used = replace(
                own,
                served=shared.served,
                worked=shared.worked,
                known=shared.known,
                startup_s=shared.startup_s,
            )
        return _Asking(demand, fleet, load, own, used, before.calm)

    # -- deciding -------------------------------------------------------------------------

    def plan(self, bounds: Bounds, room: int | None) -> int:
        """Ask each demand, and plan the starts; return how many there are. ``room``: how many at most."""
        most = Bounds(most=bounds.most)
        asks = [one.ask(most, self._settings, self._now) for one in self._within]
        for place, (one, same) in enumerate(zip(self._before, self._within, strict=True)):
            if one is not same:
                surplus = one.ask(most, self._settings, self._now).surplus
                asks[place] = replace(asks[place], certain=surplus)
        asks.append(self._whole.ask(bounds, self._settings, self._now))
        alone = [one.ask(most, self._settings, self._now) for one in self._alone]
        by_group = {group: ask for ask in alone for group in ask.demand.groups}
        self._plan = Plan(self._fleets, asks, alone=by_group, least=bounds.least, room=room)
        return len(self._plan.actions)

    def stops(self, units: Mapping[Key, UnitMemory]) -> list[Action]:
        """Return what may be stopped, the first to be stopped first."""
        if any(one.surplus > 0 for one in (self._whole, *self._alone)):
            for fleet in self._fleets.values():
                sort_spare(fleet, self._seen, units, self._settings, self._now)
        return self._planned.stops()

    @property
    def _planned(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("stops are planned after starts")
        return self._plan

    @property
    def actions(self) -> list[Action]:
        """Return the actions, without the stops of surplus instances."""
        return [*self._planned.ends, *self._planned.actions]

    def settle(self, stops: Sequence[Action]) -> None:
        """Take note of what is stopped, all parts of the fleet considered."""
        ours = {instance.key for instance in self.fleet.serving} if stops else ()
        self._stops = [action for action in stops if action.key in ours]
        verdict = verdict_of([*self.actions, *self._stops], self.broken)
        for one in (self._whole, *self._finer):
            one.calm = one.calm.after(verdict, self._settings, self._now)

    # -- telling --------------------------------------------------------------------------

    @property
    def acts(self) -> bool:
        """Tell whether anything is started or stopped."""
        return bool(self.actions or self._stops)

    @property
    def name(self) -> str:
        """Return the part's name."""
        return self.part.name

    @property
    def fleet(self) -> Fleet:
        """Return all its instances."""
        return self._whole.fleet

    @property
    def load(self) -> Load:
        """Return all that it may serve."""
        return self._whole.load

    @property
    def rates(self) -> Rates:
        """Return the rates that it was decided from."""
        return self._whole.used

    @property
    def broken(self) -> frozenset[Key]:
        """Return the starts that are given up."""
        return frozenset(self.fleet.broken)

    @property
    def need(self) -> Need:
        """Return what the part as a whole needs, with what demands within it lack."""
        need = _asked(self._whole)
        lacking = [_asked(one).wanted - one.fleet.running for one in self._within]
        return replace(need, wanted=max([need.wanted, *(self.fleet.running + more for more in lacking)]))

    @property
    def measured(self) -> Measured:
        """Return what to remember of the whole."""
        return Measured(rates=self._whole.own, calm=self._whole.calm)

    @property
    def finer(self) -> dict[str, Measured]:
        """Return what to remember of the demands within."""
        return {one.demand.name: Measured(rates=one.own, calm=one.calm) for one in self._finer}

    @property
    def _finer(self) -> list[_Asking]:
        """Return all but the whole, each once."""
        own = [one for one, same in zip(self._before, self._within, strict=True) if one is not same]
        return [*self._within, *own, *self._alone]

    def why(self) -> str:
        """Say why this is done, or nothing."""
        done = [*self.actions, *self._stops]
        lacking = (one for one in self._within if _asked(one).up > one.fleet.running)
        top = next(lacking, self._whole)
        need, fleet = _asked(top), top.fleet
        if done:
            return f"{done[0].why}; {need.formula}" if done[0].verb == "start" else done[0].why
        if need.wanted > max(fleet.running, need.enough):
            return f"{need.wanted} wanted, but no instance is left to start; {need.formula}"
        if need.enough < fleet.running and self._planned.kept_for:
            found = sorted(self._planned.kept_for.lanes, key=lambda lane: QUEUES.index(lane.tier))
            lanes = [f"{lane.tier}.{lane.model}".rstrip(".") for lane in found]
            some = ", ".join(lanes[:NAMED_LANES]) + (", ..." if len(lanes) > NAMED_LANES else "")
            return f"{need.enough} would do, but {some} might then wait for workers busy with other tasks"
        if need.enough < fleet.running:
            pause_s = top.calm.pause(self._settings)
            return f"{need.enough} would do; waits until that has held for {pause_s:.0f} s"
        return need.formula

    def __str__(self) -> str:
        need, fleet = self.need, self.fleet
        text = f"{self.name}: {self.load.waiting} waiting, {fleet.running} of {fleet.possible} run"
        return f"{text}, {need.wanted} wanted, {self.rates.service(self._settings):.3g}/s a worker"


def _asked(one: _Asking) -> Need:
    if one.need is None:
        raise RuntimeError("it has not been asked yet")
    return one.need


def verdict_of(actions: Sequence[Action], broken: frozenset[Key]) -> Verdict:
    """Say in a word what is done; what is given up, and is stopped, is a repair."""
    verbs = {action.verb for action in actions if action.key not in broken}
    if "start" in verbs:
        return "scale_up"
    if "stop" in verbs:
        return "scale_down"
    return "repair" if actions else "hold"
