# SPDX-License-Identifier: Apache-2.0
"""Finds the troubles that alerts are sent for (``gpuinfer.alerts``), at each probe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import redis

from gpuinfer.alerts.alerting import Alerting
from gpuinfer.alerts.register import Alert, Event
from gpuinfer.alerts.resources import Resources
from gpuinfer.plural import many, tasks_wait
from gpuinfer.queue.depth import Lane
from gpuinfer.settings import Settings
from gpuinfer.watcher.memory import UnitMemory
from gpuinfer.watcher.policy import Decision
from gpuinfer.watcher.state import Instance, Key, Observation, Stranded

#: Characters that may not stand in an alert's name: it becomes a part of a unit's name.
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")


class Troubles:
    """Finds troubles for one watcher. Blocking: call it in a thread."""

    def __init__(self, settings: Settings, client: redis.Redis, host: str, alerting: Alerting) -> None:
        self._client = client
        self._host = host
        self._alerting = alerting
        self._resources = Resources(settings, client)

    def find(self, decision: Decision, seen: Observation, now: float) -> list[Event]:
        """Return what to report; the first live watcher by host name reports the fleet's troubles."""
        away = seen.queues is None
        first = not seen.live_hosts or self._host == min(seen.live_hosts)
        own = [one for one in seen.instances if seen.owns(one.key)]
        disks, memory = self._resources.measure(away=away)
        ours = [*of_workers(own, decision.history.units, now), *disks]
        if away:
            text = f"Redis cannot be read: {seen.trouble}"
            ours.append(Alert("redis-away", text, "gpuinfer doctor redis"))
        elif first:
            ours += memory
        fleet = [*of_queues(seen.dead_letters, decision.stranded)] if first else None
        return self._alerting.update(self._client, ours, fleet, now, away=away)


def of_workers(own: Iterable[Instance], units: Mapping[Key, UnitMemory], now: float) -> Iterator[Alert]:
    """Yield an alert for each worker of this host that a failure keeps from running."""
    for one in own:
        unit = units.get(one.key)
        why = unit.why if unit is not None and unit.quarantine(now) else ""
        why = why or (f"its GPU is not healthy ({one.gpu.fault})" if one.gpu.fault else "")
        if why and not one.masked:
            number = one.key.number
            remedy = f"journalctl -u gpuinfer-worker@{number} -n 20"
            yield Alert(f"quarantine.gpu{number}", f"worker {number} is in quarantine: {why}", remedy)


def of_queues(dead_letters: int, stranded: Mapping[Lane, Stranded] | None) -> Iterator[Alert]:
    """Yield the fleet's alerts: dead letters, and tasks that no worker serves."""
    if dead_letters:
        text = f"{many(dead_letters, 'task is', 'tasks are')} set aside as dead letters"
        yield Alert("dead-letters", text, "gpuinfer dead list")
    for lane, found in (stranded or {}).items():
        name = _UNFIT.sub("_", f"no-worker.{lane.name}")
        model = lane.model or "the default model"
        text = f"{tasks_wait(found.waiting)} in {lane.tier} for {model}, which no worker serves"
        yield Alert(name, text, found.remedy)
