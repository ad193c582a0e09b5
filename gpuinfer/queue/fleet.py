# SPDX-License-Identifier: Apache-2.0
"""Which workers serve what, on all hosts: from the workers' heartbeats and the watchers' reports.

A running worker's heartbeat says what it serves. For the instances that do not run, each host's watcher
reports what they would serve, with the time of the report, in one hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import redis

from gpuinfer.queue import heartbeats
from gpuinfer.queue.depth import Lane
from gpuinfer.settings import QUEUES

#: Host -> its watcher's report on its instances.
HOSTS = "gpuinfer:watcher:hosts"
#: A watcher is silent after this long without a new report, or after this many of its own intervals.
SILENT_S = 10.0
SILENT_LOOKS = 3.0


class Serves(NamedTuple):
    """What a worker serves: each of its models in each of its tiers."""

    #: In the order of QUEUES.
    tiers: tuple[str, ...] = QUEUES
    #: Sorted. Empty: any model, because it is not known which.
    models: tuple[str, ...] = ()

    def covers(self, lane: Lane) -> bool:
        """Tell whether it serves a lane.

        While no default model is set, its lanes name no model. Every worker covers these: the first worker to
        be ready sets the default.
        """
        return lane.tier in self.tiers and (not self.models or not lane.model or lane.model in self.models)

    def overlaps(self, other: Serves) -> bool:
        """Tell whether both may serve the same lane."""
        shared = not self.models or not other.models or not set(self.models).isdisjoint(other.models)
        return shared and not set(self.tiers).isdisjoint(other.tiers)

    def __str__(self) -> str:
        return f"{','.join(self.tiers)}:{','.join(self.models) or '*'}"


#: Every tier and any model: for a fleet in which all workers serve the same.
EVERYTHING = Serves()


def serves_of(queues: Iterable[str], models: Iterable[str]) -> Serves:
    """Return what a worker with these queues and models serves."""
    asked = set(queues)
    return Serves(tuple(name for name in QUEUES if name in asked), tuple(sorted(models)))


@dataclass(frozen=True, slots=True, order=True)
class Server:
    """One worker, running or not, and what it serves or would serve."""

    number: int
    host: str
    serves: Serves
    masked: bool = False
    #: Why it is not started.
    excluded: str = ""


def said(heartbeat: Mapping[str, Any]) -> Serves | None:
    """Return what a worker's heartbeat says it serves; None if it does not say."""
    try:
        serves = serves_of(heartbeat.get("queues", ()), heartbeat.get("models", ()))
    except TypeError:
        return None
    return serves if serves.tiers and serves.models else None


def told(instance: Mapping[str, Any]) -> Serves:
    """Return what an instance would serve, by its watcher's report. Raises TypeError if that is no list."""
    serves = serves_of(instance.get("tiers", QUEUES), instance.get("models", ()))
    return serves if serves.tiers else EVERYTHING


def silent_after(body: Mapping[str, Any]) -> float:
    """Return the seconds without a new report after which a watcher counts as silent."""
    return max(SILENT_S, SILENT_LOOKS * float(body.get("interval_s", 0.0)))


def servers(client: redis.Redis) -> list[Server]:
    """Return the workers of all hosts: those with a fresh heartbeat, and those that a live watcher reports.

    Raises redis-py's errors.
    """
    beats = heartbeats.fresh(client)
    seconds, microseconds = client.time()
    now = float(seconds + microseconds / 1e6)
    found: dict[tuple[int, str], Server] = {}
    hosts: Mapping[Any, Any] = client.hgetall(HOSTS)
    for name, text in hosts.items():
        host = name.decode(errors="replace")
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # the watchers log it
            body = orjson.loads(text)
            for one in body["instances"] if now - body["at"] <= silent_after(body) else ():
                number = int(one["number"])
                found[number, host] = Server(
                    number, host, told(one), bool(one.get("masked")), str(one.get("excluded", ""))
                )
    for worker, body in beats.items():
        gpu, _, host = worker.removeprefix("gpu").partition("@")
        serves = said(body)
        if gpu.isdecimal() and serves:
            found[int(gpu), host] = Server(int(gpu), host, serves)
    return sorted(found.values())


def remedy(lane: Lane, workers: Sequence[Server]) -> str:
    """Return the command that gives a worker to the tasks of a lane that no worker serves."""
    known = sorted(workers)
    for one in known:
        if one.serves.covers(lane):
            return f"{_start(one)}  # on {one.host}"
    same_model = [one for one in known if lane.model in one.serves.models]
    chosen = next(iter(same_model or known), None)
    number, where = (chosen.number, f" on {chosen.host}") if chosen else (0, "")
    serves = chosen.serves if chosen else EVERYTHING
    if same_model or not lane.model:  # the queue is not served; without a default model, any model will do
        setting = f"GPUINFER_WORKER_QUEUES={','.join((*serves.tiers, lane.tier))}"
    else:
        setting = f"GPUINFER_WORKER_MODELS={','.join((*serves.models, lane.model))}"
    file = f"/etc/gpuinfer/worker@{number}.env"
    return f"echo {setting} >> {file} && systemctl try-restart gpuinfer-worker@{number}  # for example{where}"


def quarantined(workers: Sequence[Server]) -> list[tuple[str, str]]:
    """Return (problem, command that shows more) for each worker in quarantine.

    systemd may show its unit as inactive, like that of an idle worker.
    """
    return [
        (
            f"worker {one.number} is {one.excluded}",
            f"journalctl -u gpuinfer-worker@{one.number} -n 20  # on {one.host}",
        )
        for one in workers
        if "in quarantine" in one.excluded
    ]


def _start(one: Server) -> str:
    """Return the command that starts a worker, by what keeps it from being started."""
    unit = f"gpuinfer-worker@{one.number}"
    if one.masked:
        return f"systemctl unmask {unit} && systemctl start {unit}"
    if "watcher is silent" in one.excluded:
        return "systemctl restart gpuinfer-watcher"
    if "gpuinfer-workers.target is stopped" in one.excluded:
        return "systemctl start gpuinfer-workers.target"
    return f"systemctl start {unit}"
