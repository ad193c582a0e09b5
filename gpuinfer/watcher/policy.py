# SPDX-License-Identifier: Apache-2.0
"""Decides what to start and stop: pure, the same for systemd and the simulator.

The instances are grouped by what they serve (``fleet``), and the lanes by which groups serve them (``load``).
Each demand is measured (``rates``), asks for workers (``need``) and has its own cooldown (``cooldown``); one
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
from gpuinfer.watcher.part import Assessment, Measured, verdict_of
from gpuinfer.watcher.plan import one_a_host
from gpuinfer.watcher.state import Action, Exclusion, Figures, Key, Observation, QueueState, Stranded, Verdict
from gpuinfer.watcher.words import first_of


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What one decision hands to the next."""

    #: By the name of each part of the fleet.
    parts: Mapping[str, Measured] = field(default_factory=dict)
    #: By the name of each demand within a part.
    within: Mapping[str, Measured] = field(default_factory=dict)
    units: Mapping[Key, UnitMemory] = field(default_factory=dict)

    @property
    def figures(self) -> Mapping[str, Figures]:
        """Return what is published to the other hosts' watchers."""
        return {name: measured.rates.figures for name, measured in self.parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and what to remember."""

    actions: tuple[Action, ...]
    verdict: Verdict
    why: str
    #: The figures it was made from, for the journal: name -> number or text.
    inputs: Mapping[str, object]
    history: History
    #: Instances that must not be started, or are not counted on.
    excluded: Mapping[Key, Exclusion] = field(default_factory=dict)
    #: Lanes with tasks that no instance serves or could be started for. None: Redis cannot be read.
    stranded: Mapping[Lane, Stranded] | None = None

    def of(self, host: str) -> tuple[Action, ...]:
        """Return the actions that this host carries out."""
        return tuple(action for action in self.actions if action.key.host == host)


def decide(seen: Observation, history: History, settings: WatcherSettings, now: float) -> Decision:
    """Decide. Pure: the same arguments give the same decision."""
    remembered = remember(seen, history.units, settings, now)
    if seen.queues is None:
        why = f"Redis cannot be read, so nothing changes: {seen.trouble or 'no reason given'}"
        kept = replace(history, units=remembered.units)
        return Decision(actions=(), verdict="hold", why=why, inputs={}, history=kept)
    fleets = grouped(seen, remembered.units, settings, now) or {EVERYTHING: Fleet()}
    before = {**history.parts, **history.within}
    parts = [
        Assessment(part, seen, before, fleets, remembered.startups, settings, now)
        for part in parts_of(frozenset(fleets), frozenset(seen.queues))
    ]
    _plan(parts, settings)
    stops = one_a_host([action for part in parts for action in part.stops()])
    for part in parts:
        part.settle(stops)
    actions = [action for part in parts for action in part.actions] + stops
    return Decision(
        actions=tuple(actions),
        verdict=verdict_of(actions, frozenset().union(*(part.broken for part in parts))),
        why=_why(parts) + _paused(seen.queues),
        inputs=_inputs(seen, parts, settings),
        history=History(
            parts={part.name: part.whole.measured for part in parts},
            within={name: measured for part in parts for name, measured in part.finer.items()},
            units=commanded(remembered.units, actions, seen, now),
        ),
        excluded={key: why for part in parts for key, why in part.fleet.excluded.items()},
        stranded=_stranded(seen, seen.queues, fleets),
    )


def _plan(parts: Sequence[Assessment], settings: WatcherSettings) -> None:
    """Plan the starts of all parts: floor and ceiling are those of the whole fleet."""
    least = _floors(parts, settings.floor)
    working = {part.name for part in parts if part.asks}
    room = settings.ceiling - sum(part.fleet.running for part in parts) if settings.ceiling else None
    # Where nothing runs yet, the first worker matters most.
    for part in sorted(parts, key=lambda one: one.fleet.running > 0):
        others = len(working - {part.name})  # one worker is left to each of them
        most = max(1, settings.ceiling - others) if settings.ceiling else 0
        started = part.plan(Bounds(least[part.name], most), room)
        room = None if room is None else room - started


def _floors(parts: Sequence[Assessment], floor: int) -> dict[str, int]:
    """Share the floor out: one to each part in turn, the largest part first, as far as it goes."""
    least = dict.fromkeys((part.name for part in parts), 0)
    if len(parts) == 1:
        return dict.fromkeys(least, floor)
    order = sorted(parts, key=lambda part: (-part.fleet.possible, part.name))
    while floor > 0:
        short = [part for part in order if least[part.name] < part.fleet.possible][:floor]
        if not short:
            break
        for part in short:
            least[part.name] += 1
        floor -= len(short)
    return least


def _stranded(
    seen: Observation, queues: Mapping[Lane, QueueState], fleets: Mapping[Serves, Fleet]
) -> dict[Lane, Stranded]:
    """Return the lanes with tasks that no worker serves, and none could be started for."""
    able = [group for group, fleet in fleets.items() if fleet.possible or fleet.returning]
    excluded = {key: str(why) for fleet in fleets.values() for key, why in fleet.excluded.items()}
    servers = [
        Server(one.key.number, one.key.host, one.serves, one.masked, excluded.get(one.key, one.excluded))
        for one in seen.instances
    ]
    return {
        lane: Stranded(queue.waiting, remedy(lane, servers))
        for lane, queue in sorted(queues.items())
        if queue.waiting and not queue.paused and not any(group.covers(lane) for group in able)
    }


def _why(parts: Sequence[Assessment]) -> str:
    """Return why, for each part with actions; without any, for those where tasks wait or workers run."""
    if len(parts) == 1:
        return parts[0].why()
    acting = [part for part in parts if part.acts]
    asking = [part for part in parts if part.asks or part.fleet.running]
    told = acting or asking or parts[:1]
    return first_of([f"{part.name}: {part.why()}" for part in told], "; ")


def _paused(queues: Mapping[Lane, QueueState]) -> str:
    """Name the paused queues with tasks that wait: no worker is started for them."""
    found = first_of([lane.name for lane, one in sorted(queues.items()) if one.paused and one.waiting])
    return f"; paused, so that no worker is started for them: {found}" if found else ""


def _inputs(seen: Observation, parts: Sequence[Assessment], settings: WatcherSettings) -> dict[str, object]:
    first, fleets, needs = parts[0], [part.fleet for part in parts], [part.need for part in parts]
    active, running = sum(fleet.active for fleet in fleets), sum(fleet.running for fleet in fleets)
    known = {
        "rate_per_worker": round(first.whole.used.service(settings), 3),
        "startup_s": round(first.whole.used.startup(settings), 1),
    }
    named = {"parts": first_of([*map(str, parts)], "; ")}
    desired = sum(need.unlimited for need in needs)
    return {
        "waiting": seen.waiting,
        "oldest_s": round(max((q.oldest_s for q in (seen.queues or {}).values()), default=0.0), 1),
        "arrivals_per_s": round(sum(part.whole.used.steady for part in parts), 3),
        **(known if len(parts) == 1 else named),
        "active": active,
        "starting": running - active,
        "possible": sum(fleet.possible for fleet in fleets),
        "desired": min(desired, settings.ceiling or desired),
        "minimum": sum(need.minimum for need in needs),
        "dead_letters": seen.dead_letters,
    }
