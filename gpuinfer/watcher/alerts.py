# SPDX-License-Identifier: Apache-2.0
"""Which trouble is told to people, once when it begins and once when it ends. Pure.

    what a look has found ─► present ─► step(register before, present, now) ─► events, register after

A trouble begins when it has held for a while, and ends when it was gone for a while, so that nothing that
comes and goes rings at every look.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from gpuinfer.queue.depth import Lane
from gpuinfer.queue.orphans import ago
from gpuinfer.watcher.memory import UnitMemory
from gpuinfer.watcher.state import Instance, Key
from gpuinfer.watcher.stranded import Stranded

Stage = Literal["began", "ended"]
#: Seconds that a trouble must hold before it is told; a restart of Redis, and a start of a worker, take some.
HOLD_S: Mapping[str, float] = {"redis-away": 10.0, "no-worker": 10.0}
#: Seconds that it must be gone before its end is told.
GONE_S = 30.0
#: A share of Redis's memory above which new work is about to be refused; of a disk, bytes below which.
FULL_SHARE = 0.95
LOW_BYTES = 1024**3
_GIB = 1024**3
#: A name becomes a part of a unit's.
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")


class Alert(NamedTuple):
    """One trouble."""

    #: Its kind, and what it is about where there may be several: ``quarantine.gpu3``.
    name: str
    what: str
    #: The command that helps.
    remedy: str

    @property
    def kind(self) -> str:
        """Return its kind."""
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Known:
    """A trouble that is, or was a moment ago."""

    since: float
    what: str
    remedy: str
    #: Its beginning has been told.
    told: bool = False
    #: Since when it is gone; 0: it is not.
    gone: float = 0.0


class Event(NamedTuple):
    """What is to be told."""

    stage: Stage
    alert: Alert
    #: When the trouble began, in seconds since the epoch.
    since: float


Register = Mapping[str, Known]


def step(
    before: Register, present: Iterable[Alert], now: float, unknown: Iterable[str] = ()
) -> tuple[dict[str, Known], list[Event]]:
    """Return the register after a look, and what is to be told. ``unknown``: kinds that could not be seen."""
    here, blind = {alert.name: alert for alert in present}, frozenset(unknown)
    after: dict[str, Known] = {}
    events: list[Event] = []
    for name in sorted({*before, *here}):
        alert, known = here.get(name), before.get(name)
        if alert is None:
            if known is None:
                continue
            gone = Alert(name, known.what, known.remedy)
            if gone.kind in blind:
                after[name] = known
            elif not known.told:
                continue
            elif now - (known.gone or now) < GONE_S:
                after[name] = replace(known, gone=known.gone or now)
            else:
                events.append(Event("ended", gone, known.since))
            continue
        known = known or Known(now, alert.what, alert.remedy)
        told = known.told or now - known.since >= HOLD_S.get(alert.kind, 0.0)
        if told and not known.told:
            events.append(Event("began", alert, known.since))
        after[name] = Known(known.since, alert.what, alert.remedy, told)
    return after, events


# -- what there is ------------------------------------------------------------------------


def of_workers(own: Iterable[Instance], units: Mapping[Key, UnitMemory], now: float) -> Iterator[Alert]:
    """Yield this host's workers that are kept from work by a failure."""
    for one in own:
        unit = units.get(one.key)
        why = unit.why if unit is not None and unit.quarantine(now) else ""
        why = why or (f"its GPU is not healthy: {one.gpu.fault}" if one.gpu.fault else "")
        if why and not one.masked:
            number = one.key.number
            remedy = f"journalctl -u gpuinfer-worker@{number} -n 20"
            yield Alert(f"quarantine.gpu{number}", f"worker {number} is in quarantine: {why}", remedy)


def of_queues(dead_letters: int, stranded: Mapping[Lane, Stranded] | None) -> Iterator[Alert]:
    """Yield the fleet's: dead letters, and what waits for nobody."""
    if dead_letters:
        text = "1 task is" if dead_letters == 1 else f"{dead_letters} tasks are"
        yield Alert("dead-letters", f"{text} set aside as dead letters", "gpuinfer dead list")
    for lane, found in (stranded or {}).items():
        name = _UNFIT.sub("_", f"no-worker.{lane.tier}.{lane.model}".rstrip("."))
        model = lane.model or "the default model"
        waiting = "1 task waits" if found.waiting == 1 else f"{found.waiting} tasks wait"
        yield Alert(name, f"{waiting} in {lane.tier} for {model}, which no worker serves", found.remedy)


def of_memory(used: int, limit: int) -> Iterator[Alert]:
    """Yield a Redis whose memory is nearly full, in bytes; ``limit`` 0: it has none."""
    if limit and used >= FULL_SHARE * limit:
        text = f"Redis is full: {used // 2**20} of {limit // 2**20} MiB used; new work is refused"
        yield Alert("redis-full", text, "gpuinfer queue status")


def of_disks(free: Mapping[str, int]) -> Iterator[Alert]:
    """Yield disks with little room; ``free``: folder -> bytes."""
    for place, (folder, room) in enumerate(free.items()):
        if room < LOW_BYTES:
            text = f"{folder} has {room / _GIB:.1f} GiB free; a full disk makes Redis refuse all writes"
            yield Alert(f"disk.{place}", text, f"du -xh --max-depth=2 {folder} | sort -h | tail")


def away(trouble: str) -> Alert:
    """Return the alert for a Redis that cannot be read."""
    return Alert("redis-away", f"Redis cannot be read: {trouble}", "gpuinfer doctor redis")


def told(event: Event, host: str, now: float) -> dict[str, str]:
    """Return an event as the alert's command finds it in its environment."""
    alert = event.alert
    line = alert.what if event.stage == "began" else f"over after {ago(now - event.since)}: {alert.what}"
    return {
        "ALERT_NAME": alert.name,
        "ALERT_STATE": event.stage,
        "ALERT_HOST": host,
        "ALERT_SINCE": f"{event.since:.0f}",
        "ALERT_TEXT": line,
        "ALERT_REMEDY": alert.remedy if event.stage == "began" else "",
    }
