# SPDX-License-Identifier: Apache-2.0
"""One sentence about a part of the fleet: what is desired, what runs, why, and which instances are excluded.

It appears in the journal, in ``systemctl status`` and in ``gpuinfer watcher explain``, for somebody who wants
to know at night why a worker runs or does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpuinfer.watcher.state import Exclusion, Key

#: Name at most this many instances, lanes or parts of the fleet.
NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a sentence is made from."""

    #: How many workers are desired, even if there are fewer instances; and how many run.
    desired: int
    running: int
    #: Why that many are desired.
    cause: str
    starting: Sequence[Key] = ()
    #: Not needed any more.
    stopping: Sequence[Key] = ()
    #: Their starts keep failing.
    given_up: Sequence[Key] = ()
    #: How many could run.
    possible: int = 0
    #: Running instances that are never stopped, and why.
    staying: Mapping[Key, str] = field(default_factory=dict)
    #: Lanes whose tasks might have to wait for workers that are busy with other lanes.
    needed_by: str = ""
    #: A worker is stopped when it has not been needed for this long.
    cooldown_s: float = 0.0
    excluded: Mapping[Key, Exclusion] = field(default_factory=dict)


def sentence(now: Situation) -> str:
    """Return the sentence."""
    desired = {0: "no worker is desired", 1: "1 worker is desired"}
    run = {0: "none runs", 1: "1 runs"}
    head = desired.get(now.desired, f"{now.desired:,} workers are desired")
    text = f"{head}, {run.get(now.running, f'{now.running:,} run')}: {now.cause}"
    alike: dict[str, list[str]] = {}
    for key, one in sorted(now.excluded.items()):
        alike.setdefault(str(one), []).append(str(key))
    excluded = [f"{_listed('', keys)} ({why})" for why, keys in alike.items()]
    return "; ".join(filter(None, [text, *_doing(now), _listed("excluded: ", excluded)]))


def _doing(now: Situation) -> list[str]:
    """Return what is started and stopped, or why nothing is."""
    done = [
        _listed("starting ", [*map(str, now.starting)]),
        _listed("stopping ", [f"{key}, not needed for {now.cooldown_s:.0f} s" for key in now.stopping]),
        _listed("stopping ", [f"{key}, whose starts keep failing" for key in now.given_up]),
    ]
    if now.desired > now.running + len(now.starting) and now.possible <= now.running + len(now.starting):
        done.append("no other instance can be started")
    if any(done):
        return done
    if now.desired >= now.running:
        return []
    if now.needed_by:
        return [f"none is stopped, since {now.needed_by} might then wait for workers busy with other tasks"]
    if len(now.staying) >= now.running:
        return [_listed("", [f"{key} {why}" for key, why in sorted(now.staying.items())])]
    return [f"one is stopped when that has been so for {now.cooldown_s:.0f} s and it is idle"]


def _listed(head: str, items: Sequence[str]) -> str:
    """Return the first few items after a heading; empty when there are none."""
    return head + first_of(items) if items else ""


def first_of(items: Sequence[str], between: str = ", ") -> str:
    """Return the first few items as text, and how many more there are."""
    more = [f"and {len(items) - NAMED} more"] if len(items) > NAMED else []
    return between.join([*items[:NAMED], *more])
