# SPDX-License-Identifier: Apache-2.0
"""Decide what to start and stop: pure, the same for systemd and the simulator.

The instances are grouped by what they serve (``fleet``), and the lanes by who serves them (``load``). Each
demand is measured (``rates``), asks for workers (``need``) and has a cooldown of its own (``cooldown``); the
plan for each part of the fleet meets all of its demands (``plan``). Where all instances serve the same, there
is one part with one demand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import EVERYTHING, Server, Serves, remedy
from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.fleet import Fleet, grouped
from gpuinfer.watcher.load import parts_of
from gpuinfer.watcher.memory import UnitMemory, commanded, remember
from gpuinfer.watcher.need import Bounds
from gpuinfer.watcher.part import Look, Measured, verdict_of
from gpuinfer.watcher.plan import one_a_host
from gpuinfer.watcher.rates import with_startups
from gpuinfer.watcher.state import Action, Exclusion, Figures, Key, Observation, QueueState, Verdict
from gpuinfer.watcher.stranded import Stranded

#: Log at most this many parts of the fleet.
NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What one decision passes on to the next."""

    #: By the name of each part of the fleet.
    parts: Mapping[str, Measured] = field(default_factory=dict)
    #: By the name of each demand within a part.
    within: Mapping[str, Measured] = field(default_factory=dict)
    units: Mapping[Key, UnitMemory] = field(default_factory=dict)

    @property
    def figures(self) -> Mapping[str, Figures]:
        """Return what the other hosts' watchers are told."""
        return {name: measured.rates.figures for name, measured in self.parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and what to remember."""

    actions: tuple[Action, ...]
    verdict: Verdict
    why: str
    #: What it was decided from, for the journal: name -> number or text.
    inputs: Mapping[str, object]
    history: History
    #: Instances that must not be started, or are not counted on.
    excluded: Mapping[Key, Exclusion] = field(default_factory=dict)
    #: Lanes with tasks that no instance serves, or could be started to serve. None: Redis cannot be read.
    stranded: Mapping[Lane, Stranded] | None = None

    def of(self, host: str) -> tuple[Action, ...]:
        """Return the actions that this host carries out."""
        return tuple(action for action in self.actions if action.key.host == host)


def decide(seen: Observation, history: History, settings: WatcherSettings, now: float) -> Decision:
    """Decide. Pure: the same arguments give the same decision."""
    remembered = remember(seen, history.units, settings, now)
    if seen.queues is None:
        why = f"Redis cannot be read, so nothing changes: {seen.trouble or 'no reason given'}"
        kept = replace(history, parts=_started(seen, history, remembered.startups), units=remembered.units)
        return Decision(actions=(), verdict="hold", why=why, inputs={}, history=kept)
    fleets = grouped(seen, remembered.units, settings, now) or {EVERYTHING: Fleet()}
    before = {**history.parts, **history.within}
    looks = [
        Look(part, seen, before, fleets, remembered.startups, settings, now)
        for part in parts_of(frozenset(fleets), frozenset(seen.queues))
    ]
    _plan(looks, settings)
    stops = one_a_host([action for look in looks for action in look.stops()])
    for look in looks:
        look.settle(stops)
    actions = [action for look in looks for action in look.actions] + stops
    return Decision(
        actions=tuple(actions),
        verdict=verdict_of(actions, frozenset().union(*(look.broken for look in looks))),
        why=_why(looks) + _paused(seen.queues),
        inputs=_inputs(seen, looks, settings),
        history=History(
            parts={look.name: look.measured for look in looks},
            within={name: measured for look in looks for name, measured in look.finer.items()},
            units=commanded(remembered.units, actions, seen, now),
        ),
        excluded={key: why for look in looks for key, why in look.fleet.excluded.items()},
        stranded=_stranded(seen, seen.queues, fleets),
    )


def _plan(looks: Sequence[Look], settings: WatcherSettings) -> None:
    """Plan the starts of all parts: floor and ceiling are those of the whole fleet."""
    least = _floors(looks, settings.floor)
    working = {look.name for look in looks if look.load.waiting or look.load.due or look.load.in_flight}
    room = settings.ceiling - sum(look.fleet.running for look in looks) if settings.ceiling else None
    # Where nothing runs yet, the first worker matters most.
    for look in sorted(looks, key=lambda one: one.fleet.running > 0):
        others = len(working - {look.name})  # one worker is left to each of them
        most = max(1, settings.ceiling - others) if settings.ceiling else 0
        started = look.plan(Bounds(least[look.name], most), room)
        room = None if room is None else room - started


def _floors(looks: Sequence[Look], floor: int) -> dict[str, int]:
    """Share the floor out: one to each part in turn, the largest part first, as far as it goes."""
    least = dict.fromkeys((look.name for look in looks), 0)
    if len(looks) == 1:
        return dict.fromkeys(least, floor)
    order = sorted(looks, key=lambda look: (-look.fleet.possible, look.name))
    while floor > 0:
        short = [look for look in order if least[look.name] < look.fleet.possible][:floor]
        if not short:
            break
        for look in short:
            least[look.name] += 1
        floor -= len(short)
    return least


def _started(
    seen: Observation, history: History, startups: Sequence[tuple[Serves, float]]
) -> Mapping[str, Measured]:
    """Remember how long starts have taken while Redis cannot be read."""
    parts = dict(history.parts)
    for part in parts_of(frozenset(one.serves for one in seen.instances), frozenset()) if startups else ():
        times = [seconds for group, seconds in startups if group in part.whole.groups]
        known = parts.get(part.name, Measured())
        parts[part.name] = replace(known, rates=with_startups(known.rates, times))
    return parts


def _stranded(
    seen: Observation, queues: Mapping[Lane, QueueState], fleets: Mapping[Serves, Fleet]
) -> dict[Lane, Stranded]:
    """Return the lanes whose tasks no worker serves, and none could be started for."""
    able = [group for group, fleet in fleets.items() if fleet.possible or fleet.returning]
    excluded = {key: str(why) for fleet in fleets.values() for key, why in fleet.excluded.items()}
    return {
        lane: Stranded(queue.waiting, remedy(lane, _servers(seen, excluded)))
        for lane, queue in sorted(queues.items())
        if queue.waiting and not queue.paused and not any(group.covers(lane) for group in able)
    }


def _servers(seen: Observation, excluded: Mapping[Key, str]) -> list[Server]:
    return [
        Server(one.key.number, one.key.host, one.serves, one.masked, excluded.get(one.key, one.excluded))
        for one in seen.instances
    ]


def _why(looks: Sequence[Look]) -> str:
    """Say why: for each part where something is done; else where tasks wait or workers run."""
    if len(looks) == 1:
        return looks[0].why()
    acting = [look for look in looks if look.acts]
    asking = [look for look in looks if look.load.waiting or look.load.due or look.fleet.running]
    told = acting or asking or looks[:1]
    return "; ".join([f"{look.name}: {look.why()}" for look in told[:NAMED]] + _more(len(told)))


def _paused(queues: Mapping[Lane, QueueState]) -> str:
    """Name the paused queues with tasks that wait: no worker is started for them."""
    found = [lane for lane, queue in sorted(queues.items()) if queue.paused and queue.waiting]
    named = [f"{lane.tier}.{lane.model}".rstrip(".") for lane in found[:NAMED]] + _more(len(found))
    return f"; paused, so that no worker is started for them: {', '.join(named)}" if found else ""


def _more(count: int) -> list[str]:
    return [f"and {count - NAMED} more"] if count > NAMED else []


def _inputs(seen: Observation, looks: Sequence[Look], settings: WatcherSettings) -> dict[str, object]:
    first, fleets, needs = looks[0], [look.fleet for look in looks], [look.need for look in looks]
    active, running = sum(fleet.active for fleet in fleets), sum(fleet.running for fleet in fleets)
    one: dict[str, object] = {
        "rate_per_worker": round(first.rates.service(settings), 3),
        "startup_s": round(first.rates.startup(settings), 1),
    }
    parts = {"parts": "; ".join([*map(str, looks[:NAMED]), *_more(len(looks))])}
    desired = sum(need.unlimited for need in needs)
    return {
        "waiting": seen.waiting,
        "oldest_s": round(max((q.oldest_s for q in (seen.queues or {}).values()), default=0.0), 1),
        "arrivals_per_s": round(sum(look.rates.steady for look in looks), 3),
        **(one if len(looks) == 1 else parts),
        "active": active,
        "starting": running - active,
        "possible": sum(fleet.possible for fleet in fleets),
        "desired": min(desired, settings.ceiling or desired),
        "minimum": sum(need.minimum for need in needs),
        "dead_letters": seen.dead_letters,
    }
