# SPDX-License-Identifier: Apache-2.0
"""One part of the fleet at one probe: measured, asked what it needs, planned for, and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.cooldown import Cooldown
from gpuinfer.watcher.fleet import Fleet, joined
from gpuinfer.watcher.load import Demand, Load, Part, load_of
from gpuinfer.watcher.need import Bounds, Inputs, need_of
from gpuinfer.watcher.plan import Ask, Plan
from gpuinfer.watcher.rates import Rates, measure, with_startups
from gpuinfer.watcher.state import Action, Key, Need, Observation, Verdict
from gpuinfer.watcher.words import Situation, first_of, sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known of one demand."""

    rates: Rates = field(default_factory=Rates)
    cooldown: Cooldown = field(default_factory=Cooldown)


@dataclass(slots=True)
class Asking:
    """One demand at this probe, and what it asks for."""

    demand: Demand
    fleet: Fleet
    load: Load
    #: Its own rates; and those that decide, with the service rate and start-up time of the whole part.
    own: Rates
    used: Rates
    cooldown: Cooldown
    #: Known once it has been asked.
    need: Need = field(default_factory=Need)

    def ask(self, bounds: Bounds, settings: WatcherSettings, now: float) -> Ask:
        """Return what is needed, and how many have not been needed for a whole cooldown."""
        inputs = Inputs(self.load, self.fleet, self.used, settings, now)
        need = self.need = need_of(inputs, self.cooldown, bounds)
        self.cooldown, surplus = self.cooldown.observe(self.fleet.running, need, settings, now)
        return Ask(self.demand, need, min(surplus, self.fleet.running - need.keep))

    @property
    def measured(self) -> Measured:
        """Return what to remember of it."""
        return Measured(rates=self.own, cooldown=self.cooldown)


class Assessment:
    """A part of the fleet at one probe."""

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
        self.whole = self._measure(part.whole, replace(known, rates=with_startups(known.rates, times)))
        self.whole.used = self.whole.own.pooled(told)
        self._within = [self._measure(one, before.get(one.name, Measured())) for one in part.within]
        self._before = [
            same if one is same.demand else self._measure(one, before.get(one.name, Measured()))
            for one, same in zip(part.before, self._within, strict=True)
        ]
        self._alone = [self._measure(one, before.get(one.name, Measured())) for one in part.alone]
        self._plan: Plan | None = None
        self._stops: list[Action] = []

    def _measure(self, demand: Demand, before: Measured) -> Asking:
        fleet = joined([self._fleets[group] for group in sorted(demand.groups)])
        load = load_of(demand.lanes, self._seen.queues or {}, demand.groups, self._seen.held)
        own = measure(before.rates, load, fleet.active, fleet.all_busy, self._settings, self._now)
        used = own
        if demand is not self.part.whole:
            used = replace(own, **asdict(self.whole.used.figures))
        return Asking(demand, fleet, load, own, used, before.cooldown)

    # -- deciding -------------------------------------------------------------------------

    def plan(self, bounds: Bounds, room: int | None) -> int:
        """Ask each demand, plan the starts and return their number. ``room``: the most there may be."""
        most = Bounds(most=bounds.most)
        asks = [one.ask(most, self._settings, self._now) for one in self._within]
        for place, (one, same) in enumerate(zip(self._before, self._within, strict=True)):
            if one is not same:
                surplus = one.ask(most, self._settings, self._now).surplus
                asks[place] = replace(asks[place], certain=surplus)
        asks.append(self.whole.ask(bounds, self._settings, self._now))
        alone = [one.ask(most, self._settings, self._now) for one in self._alone]
        by_group = {group: ask for ask in alone for group in ask.demand.groups}
        self._plan = Plan(self._fleets, asks, alone=by_group, least=bounds.least, room=room)
        return len(self._plan.actions)

    @property
    def _planned(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("plan() comes first")
        return self._plan

    def stops(self) -> list[Action]:
        """Return what may be stopped, the first to be stopped first."""
        return self._planned.stops()

    @property
    def actions(self) -> list[Action]:
        """Return the actions, without the stops of surplus instances."""
        return [*self._planned.ends, *self._planned.actions]

    def settle(self, stops: Sequence[Action]) -> None:
        """Note which instances are stopped, now that all parts of the fleet are planned."""
        ours = {one.key for one in self.fleet.counted}
        self._stops = [action for action in stops if action.key in ours]
        verdict = verdict_of([*self.actions, *self._stops], self.broken)
        for one in (self.whole, *self._finer):
            one.cooldown = one.cooldown.after(verdict, self._settings, self._now)

    # -- telling --------------------------------------------------------------------------

    @property
    def asks(self) -> bool:
        """Tell whether any task waits or runs here, or soon will."""
        load = self.whole.load.whole
        return bool(load.waiting or load.due or load.in_flight)

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
        return self.whole.fleet

    @property
    def broken(self) -> frozenset[Key]:
        """Return the instances whose starts keep failing, and are given up."""
        return frozenset(action.key for action in self._planned.ends)

    @property
    def need(self) -> Need:
        """Return what the whole part needs, and what demands within it lack on top."""
        need = self.whole.need
        lacking = [one.need.unlimited - one.fleet.running for one in self._within]
        unlimited = max([need.unlimited, *(self.fleet.running + more for more in lacking)])
        return replace(need, unlimited=unlimited)

    @property
    def finer(self) -> dict[str, Measured]:
        """Return what to remember of the demands within, by name."""
        return {one.demand.name: one.measured for one in self._finer}

    @property
    def _finer(self) -> list[Asking]:
        """Return all but the whole, each once."""
        own = [one for one, same in zip(self._before, self._within, strict=True) if one is not same]
        return [*self._within, *own, *self._alone]

    def why(self) -> str:
        """Say what is desired, what runs and what is done, and why."""
        lacking = (one for one in self._within if one.need.desired > one.fleet.running)
        top = next(lacking, self.whole)
        need, fleet = top.need, top.fleet
        desired = need.unlimited if need.unlimited > fleet.running else need.minimum
        enabled = [one for one in fleet.members if one.instance.enabled and one.exclusion is None]
        cause = need.cause if len(enabled) <= desired else f"{need.cause}, and {len(enabled)} enabled"
        return sentence(
            Situation(
                desired=max(desired, len(enabled)),
                running=fleet.running,
                cause=cause,
                starting=[action.key for action in self._planned.actions],
                stopping=[action.key for action in self._stops],
                given_up=[action.key for action in self._planned.ends],
                possible=fleet.possible,
                staying={one.key: one.stays for one in fleet.counted if one.stays},
                needed_by=self._needed_by(),
                cooldown_s=top.cooldown.length(self._settings),
                excluded=self.fleet.excluded,
            )
        )

    def _needed_by(self) -> str:
        """Name the lanes for which a worker is kept though fewer are desired."""
        kept_for = self._planned.kept_for
        lanes = sorted(kept_for.lanes, key=lambda lane: QUEUES.index(lane.tier)) if kept_for else []
        return first_of([lane.name for lane in lanes])

    def __str__(self) -> str:
        waiting, rate = self.whole.load.whole.waiting, self.whole.used.service(self._settings)
        runs = f"{self.fleet.running} of {self.fleet.possible} run"
        return f"{self.name}: {waiting} waiting, {runs}, {self.need.unlimited} desired, {rate:.3g}/s a worker"


def verdict_of(actions: Sequence[Action], broken: frozenset[Key]) -> Verdict:
    """Return what is done in one word; stopping a start that keeps failing is a repair."""
    verbs = {action.verb for action in actions if action.key not in broken}
    if "start" in verbs:
        return "scale_up"
    if "stop" in verbs:
        return "scale_down"
    return "repair" if actions else "hold"
