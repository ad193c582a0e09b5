# SPDX-License-Identifier: Apache-2.0
"""Build the status from the facts of one probe. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpuinfer.queue.depth import Depth, Lane
from gpuinfer.queue.fleet import silent_after
from gpuinfer.queue.heartbeats import FRESH_S
from gpuinfer.queue.orphans import ago
from gpuinfer.settings import QUEUES
from gpuinfer.view.facts import Facts
from gpuinfer.view.model import (
    SEVERITIES,
    GpuRow,
    HostRow,
    QueueRow,
    RedisRow,
    Severity,
    Status,
    Trouble,
    WorkerRow,
)

#: State of a unit -> state of its worker, which sends no heartbeat.
_STATES = {
    "inactive": "stopped",
    "activating": "starting",
    "active": "silent",
    "deactivating": "stopping",
    "failed": "failed",
}
#: Reasons for an excluded worker that an administrator has chosen.
_WANTED = ("masked", "stopped by hand", "disabled by hand", "gpuinfer-workers.target is stopped")
#: A worker that no watcher reports is listed for this many seconds after its last heartbeat.
_LISTED_S = 600.0


def build(facts: Facts) -> Status:
    """Build the status from the facts."""
    workers = tuple(_workers(facts))
    hosts = tuple(_hosts(facts, workers))
    troubles = [*_findings(facts), *_of_workers(workers), *_of_hosts(hosts)]
    ended, by_queue = _ended(facts.ended)
    depth = facts.depth
    return Status(
        at=facts.now,
        host=facts.host,
        version=facts.version,
        troubles=tuple(sorted(troubles, key=lambda one: SEVERITIES.index(one.severity))),
        hosts=hosts,
        workers=workers,
        queues=tuple(_queues(depth, workers, facts)) if depth is not None else (),
        redis=_redis(facts),
        ended=ended,
        ended_by_queue=by_queue,
        dead_letters=None if depth is None else depth.dead_letters,
        default_model="" if depth is None else depth.default_model,
        since_s=facts.since_s,
        curves=tuple(facts.curves),
        no_curves=facts.no_curves,
        access=tuple(facts.access),
        decided=_decided(facts.decision, facts.now),
    )


# -- workers ------------------------------------------------------------------------------


def _workers(facts: Facts) -> Iterator[WorkerRow]:
    told = {
        (int(one["number"]), host): (one, body)
        for host, body in facts.told.items()
        for one in body.get("instances", ())
    }
    named = dict.fromkeys(sorted(told))
    for worker, beat in facts.beats.items():
        key = _key(worker)
        if key is not None and facts.now - float(beat.get("at", 0.0)) <= _LISTED_S:
            named.setdefault(key)
    for key in sorted(named, key=lambda one: (one[1], one[0])):
        number, host = key
        one, body = told.get(key, ({}, {}))
        beat = facts.beats.get(f"gpu{number}@{host}", {})
        yield _worker(number, host, facts, one, body, beat)


def _key(worker: str) -> tuple[int, str] | None:
    number, _, host = worker.removeprefix("gpu").partition("@")
    return (int(number), host) if number.isdecimal() and host else None


def _worker(
    number: int,
    host: str,
    facts: Facts,
    one: Mapping[str, Any],
    body: Mapping[str, Any],
    beat: Mapping[str, Any],
) -> WorkerRow:
    alive = bool(beat) and facts.now - float(beat.get("at", 0.0)) <= FRESH_S
    silent_watcher = bool(body) and facts.now - float(body.get("at", 0.0)) > silent_after(body)
    state = str(beat.get("state", "idle")) if alive else _state(one, unknown=silent_watcher)
    names = beat.get("models", ()) if alive else one.get("models", ())
    versions = beat.get("versions") or {}
    in_flight = facts.depth.inflight.get(f"gpu{number}@{host}", 0) if facts.depth else 0
    return WorkerRow(
        number=number,
        host=host,
        state=state,
        why="" if alive else str(one.get("excluded", "")),
        models={str(name): str(versions.get(name, "")) for name in names},
        missing={str(name): str(why) for name, why in (beat.get("missing") or {}).items()} if alive else {},
        queues=tuple(beat.get("queues", ()) if alive else one.get("tiers", ())),
        done=_int(beat.get("done")) if alive else None,
        rate=_float(beat.get("rate")) if alive else None,
        in_flight=in_flight,
        busy=_float(beat.get("busy")) if alive else None,
        memory=_int(beat.get("memory_bytes")) if alive else None,
        device=str(beat.get("device", "")) if alive else "",
        gpu=_gpu(number, host, facts, body),
        since=_float(beat.get("since")) if alive else None,
        version=str(beat.get("version", "")) if alive else "",
    )


def _state(one: Mapping[str, Any], *, unknown: bool) -> str:
    if one.get("masked"):
        return "masked"
    if unknown or not one:
        return "silent"
    return _STATES.get(str(one.get("state")), "silent")


def _gpu(number: int, host: str, facts: Facts, body: Mapping[str, Any]) -> GpuRow | None:
    """Return the GPU of a worker, as its watcher reports it or, on this host, as the driver does."""
    told: Sequence[Mapping[str, Any]] = body.get("gpus", ())
    if not told and host == facts.host:
        told = facts.gpus
    for one in told:
        if number in one.get("workers", ()):
            return GpuRow(
                index=int(one["index"]),
                name=str(one.get("name", "")),
                memory_used=_int(one.get("memory_used")),
                memory_total=_int(one.get("memory_total")) or None,
                temperature_c=_int(one.get("temperature_c")),
                busy=_float(one.get("busy")),
            )
    return None


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# -- hosts --------------------------------------------------------------------------------


def _hosts(facts: Facts, workers: Sequence[WorkerRow]) -> Iterator[HostRow]:
    names = {*facts.told, *(worker.host for worker in workers)}
    for name in sorted(names):
        ours = [worker for worker in workers if worker.host == name]
        body = facts.told.get(name)
        watcher, told_s = "none", None
        if body is not None:
            told_s = max(0.0, facts.now - float(body.get("at", 0.0)))
            logs = any(one.get("log_only") for one in body.get("instances", ()))
            watcher = "silent" if told_s > silent_after(body) else "logs" if logs else "acts"
        yield HostRow(
            name=name,
            watcher=watcher,
            told_s=told_s,
            running=sum(worker.alive for worker in ours),
            instances=len(ours),
            gpus=len({worker.gpu.index for worker in ours if worker.gpu is not None}),
        )


# -- queues -------------------------------------------------------------------------------


def _queues(depth: Depth, workers: Sequence[WorkerRow], facts: Facts) -> Iterator[QueueRow]:
    models = {*depth.catalogue, depth.default_model} - {""} or {""}
    lanes = {Lane(tier, model) for tier in QUEUES for model in models} | {*depth.lanes, *depth.later}
    live = [worker for worker in workers if worker.alive]
    measured = _measured(facts)
    for lane in sorted(lanes, key=lambda one: (list(QUEUES).index(one.tier), one.model)):  # type: ignore[arg-type]
        waiting = sum(depth.lanes.get(lane, {}).values())
        figures = measured.get(lane.name, {})
        yield QueueRow(
            tier=lane.tier,
            model=lane.model,
            waiting=waiting,
            later=depth.later.get(lane, 0),
            oldest_s=_float(figures.get("oldest_s")) if waiting else None,
            rate=_float(figures.get("rate")),
            paused=depth.is_paused(lane),
            workers=sum(lane.tier in one.queues and lane.model in one.models for one in live),
        )


def _measured(facts: Facts) -> Mapping[str, Mapping[str, Any]]:
    """Return what live watchers measured of the queues; of several, the one with the longest wait counts."""
    found: dict[str, Mapping[str, Any]] = {}
    for body in facts.told.values():
        if facts.now - float(body.get("at", 0.0)) <= silent_after(body):
            for name, one in (body.get("queues") or {}).items():
                if name not in found or one.get("oldest_s", 0.0) > found[name].get("oldest_s", 0.0):
                    found[name] = one
    return found


def _ended(counters: Mapping[str, int] | None) -> tuple[dict[str, int] | None, dict[str, dict[str, int]]]:
    """Return the numbers of ended tasks by outcome, in total and by queue."""
    if counters is None:
        return None, {}
    totals: Counter[str] = Counter()
    by_queue: dict[str, dict[str, int]] = {}
    for name, count in sorted(counters.items()):
        outcome, tier, model = (*name.split(" ", 2), "", "")[:3]
        if outcome == "bytes":
            continue
        totals[outcome] += count
        queue = by_queue.setdefault(f"{tier}.{model}".rstrip("."), {})
        queue[outcome] = queue.get(outcome, 0) + count
    return dict(totals), by_queue


# -- the broker and the rest --------------------------------------------------------------


def _redis(facts: Facts) -> RedisRow:
    info, durability = facts.info, facts.durability or {}
    return RedisRow(
        place=facts.place,
        reachable=facts.reachable,
        version=str(info.get("valkey_version") or info.get("redis_version", "")),
        memory_used=_int(info.get("used_memory")),
        memory_max=_int(info.get("maxmemory")) or None,
        clients=_int(info.get("connected_clients")),
        up_s=_int(info.get("uptime_in_seconds")),
        evicted=_int(info.get("evicted_keys")),
        appendfsync=durability.get("appendfsync", ""),
        means=durability.get("means", ""),
    )


def _decided(entry: Mapping[str, Any] | None, now: float) -> str:
    if entry is None:
        return ""
    actions = ", ".join(f"{one['verb']} {one['instance']}" for one in entry.get("actions", ()))
    what = f"{entry['verdict']}{f' ({actions})' if actions else ''}: {entry['why']}"
    return f"{ago(max(0.0, now - float(entry['at'])))} ago, {entry['host']}: {what}"


# -- trouble ------------------------------------------------------------------------------


def _findings(facts: Facts) -> Iterator[Trouble]:
    for found in facts.findings:
        if found.status in ("error", "warning"):
            severity: Severity = "error" if found.status == "error" else "warning"
            yield Trouble(severity=severity, what=found.message, remedy=found.remedy, check=found.check)


def _of_workers(workers: Sequence[WorkerRow]) -> Iterator[Trouble]:
    """Report workers that are excluded because of failures; one line for the same reason on one host."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for worker in workers:
        if worker.why and not worker.why.startswith(_WANTED):
            reasons.setdefault((worker.host, worker.why), []).append(worker.number)
    for (host, why), numbers in reasons.items():
        names = ", ".join(f"gpu{number}@{host}" for number in numbers)
        remedy = f"journalctl -u gpuinfer-worker@{numbers[0]} -n 20  # on {host}"
        yield Trouble(severity="warning", what=f"{names} not started: {why}", remedy=remedy)


def _of_hosts(hosts: Sequence[HostRow]) -> Iterator[Trouble]:
    for host in hosts:
        if host.watcher == "silent":
            since = ago(host.told_s or 0.0)
            what = f"the watcher of {host.name} is silent for {since}: workers are not started there"
            yield Trouble(
                severity="warning", what=what, remedy=f"systemctl restart gpuinfer-watcher  # on {host.name}"
            )
