# SPDX-License-Identifier: Apache-2.0
"""Which instances can serve which lanes: the fleet in parts that share no work, and the demands within each.

Instances that serve the same are a group. Groups that serve a common lane, directly or through other groups,
form one part of the fleet: no other part can help it. Most fleets have a single part.

Within a part, lanes and the workers that may serve them form a bipartite graph. By Hall's theorem (1935)
there are enough workers when there are for each set of lanes that the same groups serve, and for the whole
part. Each such set is a demand: the lanes that no other group can serve, and the groups that share them.

The theorem supposes that tasks are assigned. But workers claim them, the most urgent first: workers that
serve two lanes may be busy with one, while workers that serve only that one are idle. So before a worker is
stopped, each demand must be certain to be served: its dedicated groups, which serve nothing else, keep up
with it, or all its groups keep up with everything that they may claim before it (``before``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import QUEUES
from gpuinfer.watcher.state import QueueState

Groups = frozenset[Serves]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Lanes, and all the groups that serve any of them."""

    #: The same in every watcher, also after a restart.
    name: str
    groups: Groups
    lanes: tuple[Lane, ...]
    #: The groups that serve no other lanes.
    dedicated: Groups = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Groups that share work with each other, and with no other one."""

    whole: Demand
    #: Demands of fewer groups than the whole part, the fewest groups first.
    within: tuple[Demand, ...] = ()
    #: For each of ``within``: its groups, with all lanes that they may claim from before the least urgent of
    #: its own; the same demand where there are no such lanes.
    before: tuple[Demand, ...] = ()
    #: Where there are several: each group, as if it were alone with the lanes that it serves.
    alone: tuple[Demand, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the whole."""
        return self.whole.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The lanes of a demand at one probe, added up: by tier, and as a whole."""

    tiers: Mapping[str, QueueState]
    whole: QueueState
    #: waiting + in flight + done of each lane.
    totals: Mapping[Lane, float]
    #: Tasks that active workers hold.
    held: int


def load_of(
    lanes: Iterable[Lane],
    queues: Mapping[Lane, QueueState],
    groups: Groups,
    held: Mapping[Serves, int] | None,
) -> Load:
    """Add up the lanes of a demand. ``held``: as in Observation."""
    tiers: dict[str, QueueState] = dict.fromkeys(QUEUES, QueueState())
    totals: dict[Lane, float] = {}
    for lane in lanes:
        queue = queues[lane]
        if queue.paused:  # its tasks ask for no worker
            queue = QueueState(in_flight=queue.in_flight, done=queue.done)
        else:
            totals[lane] = float(queue.waiting + queue.in_flight + queue.done)
        tiers[lane.tier] += queue
    whole = sum(tiers.values(), QueueState())
    count = whole.in_flight if held is None else sum(held.get(group, 0) for group in groups)
    return Load(tiers=tiers, whole=whole, totals=totals, held=count)


@lru_cache(maxsize=8)
def parts_of(groups: Groups, lanes: frozenset[Lane]) -> tuple[Part, ...]:
    """Return the parts of a fleet in a fixed order."""
    found = sorted(_linked(groups), key=_name)
    homes: dict[Groups, list[Lane]] = {part: [] for part in found}
    for lane in sorted(lanes):
        home = next((part for part in found if any(one.covers(lane) for one in part)), None)
        if home is not None:
            homes[home].append(lane)
    return tuple(_part(part, homes[part]) for part in found)


def _linked(groups: Groups) -> list[Groups]:
    """Return the groups in sets that share no lane with each other."""
    found: list[set[Serves]] = []
    for group in sorted(groups):
        near = [part for part in found if any(group.overlaps(one) for one in part)]
        found = [part for part in found if part not in near]
        found.append({group}.union(*near))
    return [frozenset(part) for part in found]


def _part(groups: Groups, lanes: list[Lane]) -> Part:
    whole = Demand(name=_name(groups), groups=groups, lanes=tuple(lanes))
    if len(groups) == 1:
        return Part(whole=whole)
    servers = {lane: frozenset(group for group in groups if group.covers(lane)) for lane in lanes}
    within = [_within(whole.name, those, servers) for those in {*servers.values()} - {groups}]
    alone = tuple(
        Demand(
            name=f"{whole.name} / only {group}",
            groups=frozenset([group]),
            lanes=tuple(lane for lane in lanes if group in servers[lane]),
        )
        for group in sorted(groups)
    )
    within.sort(key=lambda demand: (len(demand.groups), demand.name))
    before = tuple(_before(demand, servers) for demand in within)
    return Part(whole=whole, within=tuple(within), before=before, alone=alone)


def _within(part: str, groups: Groups, servers: Mapping[Lane, Groups]) -> Demand:
    lanes = tuple(lane for lane, those in servers.items() if those <= groups)
    dedicated = [
        group for group in groups if not any(group in servers[lane] for lane in {*servers} - {*lanes})
    ]
    return Demand(
        name=f"{part} / {_name(groups)}", groups=groups, lanes=lanes, dedicated=frozenset(dedicated)
    )


def _before(demand: Demand, servers: Mapping[Lane, Groups]) -> Demand:
    """Return a demand's groups with all lanes at least as urgent as the least urgent that they all serve."""
    last = max(QUEUES.index(lane.tier) for lane in demand.lanes if servers[lane] == demand.groups)
    ahead = [
        lane for lane, those in servers.items() if those & demand.groups and QUEUES.index(lane.tier) <= last
    ]
    lanes = tuple(sorted({*demand.lanes, *ahead}))
    if len(lanes) == len(demand.lanes):
        return demand
    return Demand(name=f"{demand.name} / and before", groups=demand.groups, lanes=lanes)


def _name(groups: Groups) -> str:
    return " + ".join(sorted(map(str, groups)))
