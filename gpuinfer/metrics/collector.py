# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the fleet as Prometheus metric families, those of ``table``, with bounded labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from gpuinfer import __version__
from gpuinfer.errors import GpuinferError
from gpuinfer.metrics.gather import Snapshot
from gpuinfer.metrics.table import METRICS, Metric
from gpuinfer.queue.tally import SIZES, TIMES_S
from gpuinfer.settings import QUEUES

#: Maximum values of a label; further ones are merged as "other".
MOST_VALUES = 200
OTHER = "other"
#: Labels whose values clients choose.
_OPEN = ("model", "key", "worker", "code", "reason")


def _codes(kind: type[GpuinferError]) -> Iterator[str]:
    """Yield the codes of errors that mean a lack of capacity: queue full, quota used up, no worker."""
    if kind.http_status in (429, 503):
        yield kind.code
    for one in kind.__subclasses__():
        yield from _codes(one)


REFUSALS = frozenset(_codes(GpuinferError))


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram: counts per bucket (not cumulative), and the sum."""

    counts: Sequence[int]
    total: float


#: Labels -> value, for one metric.
Values = dict[tuple[str, ...], float]
Bodies = dict[tuple[str, ...], Mapping[str, Any]]
Histograms = dict[tuple[str, ...], Buckets]


class Names:
    """Limits the values of labels: the first ones are kept until the process ends."""

    def __init__(self) -> None:
        self._known: dict[str, set[str]] = {}

    def of(self, label: str, value: str) -> str:
        """Return the value, or "other" if the label has the maximum number of values already."""
        if label not in _OPEN:
            return value
        known = self._known.setdefault(label, set())
        if value not in known:
            if len(known) >= MOST_VALUES:
                return OTHER
            known.add(value)
        return value


@dataclass
class Host:
    """What this host knows without Redis."""

    name: str
    #: Whether Redis runs here; this host then exposes the fleet's metrics, too.
    fleet: bool = True
    durability: str = ""
    #: Name -> folder whose disk is measured, if it exists.
    folders: Mapping[str, str] = field(default_factory=dict)
    names: Names = field(default_factory=Names)


class Fleet(Collector):
    """The answer to one scrape. ``snapshot`` is None if Redis does not answer."""

    def __init__(self, snapshot: Snapshot | None, host: Host) -> None:
        self._snapshot = snapshot
        self._host = host

    def describe(self) -> Iterable[Family]:
        """Return nothing, so that the registry does not check for duplicate names."""
        return ()

    def collect(self) -> Iterator[Family]:
        """Yield the families of ``table`` that have values, in its order."""
        found = _own(self._host)
        found["gpuinfer_redis_up"] = {(): float(self._snapshot is not None)}
        histograms: dict[str, Histograms] = {}
        if self._snapshot is not None:
            found |= _of_host(self._snapshot, self._host)
            if self._host.fleet:
                found |= _of_fleet(self._snapshot, self._host)
                histograms = _histograms(self._snapshot)
        for metric in METRICS:
            if metric.kind == "histogram":
                if metric.name in histograms:
                    yield self._histogram(metric, histograms[metric.name])
            elif metric.name in found:
                yield self._plain(metric, found[metric.name])

    def _bounded(self, metric: Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
        names = self._host.names
        return tuple(names.of(label, value) for label, value in zip(metric.labels, labels, strict=True))

    def _plain(self, metric: Metric, values: Values) -> Family:
        summed: Values = {}
        for labels in sorted(values):
            bounded = self._bounded(metric, labels)
            summed[bounded] = summed.get(bounded, 0.0) + values[labels]
        make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = make(metric.name, metric.help, labels=metric.labels)
        for bounded, value in summed.items():
            family.add_metric(bounded, value)
        return family

    def _histogram(self, metric: Metric, values: Histograms) -> Family:
        bounds = SIZES if metric.name == "gpuinfer_batch_size" else TIMES_S
        summed: dict[tuple[str, ...], tuple[list[int], float]] = {}
        for labels in sorted(values):
            counts, total = summed.setdefault(self._bounded(metric, labels), ([0] * (len(bounds) + 1), 0.0))
            one = values[labels]
            joined = [a + b for a, b in zip(counts, one.counts, strict=True)]
            summed[self._bounded(metric, labels)] = joined, total + one.total
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for bounded, (counts, total) in summed.items():
            buckets, so_far = [], 0
            for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
                so_far += count
                buckets.append((bound, float(so_far)))
            family.add_metric(bounded, buckets, total)
        return family


# -- sources of the values ----------------------------------------------------------------


def _own(host: Host) -> dict[str, Values]:
    """Return the metrics that need no Redis."""
    free: Values = {}
    size: Values = {}
    for name, folder in host.folders.items():
        try:
            disk = os.statvfs(folder)
        except OSError:
            continue
        free[name,], size[name,] = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    disks = {"gpuinfer_disk_free_bytes": free, "gpuinfer_disk_size_bytes": size} if free else {}
    return {"gpuinfer_build_info": {(__version__,): 1.0}, **disks}


#: Metric of a worker -> field of its heartbeat.
_OF_A_WORKER = {
    "gpuinfer_worker_busy_ratio": "busy",
    "gpuinfer_worker_tasks_per_second": "rate",
    "gpuinfer_worker_tasks_total": "done",
    "gpuinfer_worker_load_seconds": "load_s",
    "gpuinfer_worker_memory_bytes": "memory_bytes",
    "gpuinfer_worker_device_memory_bytes": "device_memory_bytes",
}
_OF_A_GPU = {
    "gpuinfer_gpu_temperature_celsius": "temperature_c",
    "gpuinfer_gpu_busy_ratio": "busy",
    "gpuinfer_gpu_memory_used_bytes": "memory_used",
    "gpuinfer_gpu_memory_total_bytes": "memory_total",
}
_OF_A_WATCHER = {
    "gpuinfer_watcher_desired_workers": "desired",
    "gpuinfer_watcher_quarantined": "quarantined",
}


def _of_host(seen: Snapshot, host: Host) -> dict[str, Values]:
    """Return the metrics of this host's workers, GPUs and watcher."""
    found: dict[str, Values] = {}
    alive = seen.alive
    own = {name: body for name, body in seen.beats.items() if name.partition("@")[2] == host.name}
    found["gpuinfer_worker_up"] = {(name,): float(name in alive) for name in own}
    found["gpuinfer_worker_in_flight"] = {(name,): float(seen.depth.inflight.get(name, 0)) for name in own}
    beating: Bodies = {(name,): body for name, body in own.items() if name in alive}
    for metric, key in _OF_A_WORKER.items():
        found[metric] = _picked(beating, key)
    told = seen.hosts.get(host.name, {})
    lives = host.name in seen.live_hosts
    found["gpuinfer_watcher_up"] = {(): float(lives)}
    if lives:
        for metric, key in _OF_A_WATCHER.items():
            found[metric] = _picked({(): told}, key)
        states = [one.get("state") for one in told.get("instances", ())]
        found["gpuinfer_watcher_instances"] = {(): float(len(states))}
        found["gpuinfer_watcher_running_workers"] = {(): float(states.count("active"))}
        gpus: Bodies = {(str(one.get("index")),): one for one in told.get("gpus", ())}
        for metric, key in _OF_A_GPU.items():
            found[metric] = _picked(gpus, key)
    for metric, kind in (
        ("gpuinfer_watcher_decisions_total", "decision"),
        ("gpuinfer_gpu_xids_total", "xid"),
    ):
        found[metric] = {
            tuple(what.split("/")): float(count)
            for (counted, what, its_host), count in seen.counts.items()
            if counted == kind and its_host == host.name
        }
    return {name: values for name, values in found.items() if values}


def _picked(bodies: Mapping[tuple[str, ...], Mapping[str, Any]], key: str) -> Values:
    """Return the numeric field ``key`` of each body that has it."""
    return {
        labels: float(body[key]) for labels, body in bodies.items() if isinstance(body.get(key), int | float)
    }


def _of_fleet(seen: Snapshot, host: Host) -> dict[str, Values]:
    """Return the metrics of the whole fleet, which only Redis's host exposes."""
    return {**_tasks(seen), **_front(seen), **_models(seen), **_redis(seen, host)}


#: Outcomes exposed for each queue and model, even at 0.
_OUTCOMES = ("completed", "failed", "dead")


def _tasks(seen: Snapshot) -> dict[str, Values]:
    depth = seen.depth
    lanes = {*depth.lanes, *depth.claimed, *(end.lane for end in seen.ended)}
    lanes = {lane for lane in lanes if lane.tier and lane.model}
    nothing: Values = dict.fromkeys(
        map(tuple, lanes), 0.0
    )  # starting at 0, so that a rate sees the first increase
    device = _by(seen, "device_us", lambda key, model: (model, key))
    finished: Values = {(*lane, outcome): 0.0 for lane in lanes for outcome in _OUTCOMES}
    return {
        "gpuinfer_tasks_submitted_total": _by(seen, "submitted", lambda tier, model: (tier, model)),
        "gpuinfer_tasks_finished_total": finished
        | {(*end.lane, end.outcome): float(count) for end, count in seen.ended.items()},
        "gpuinfer_result_bytes_total": {tuple(lane): float(size) for lane, size in seen.result_bytes.items()},
        "gpuinfer_tasks_redelivered_total": {(cause,): 0.0 for cause in ("restart", "reaper")}
        | _by(seen, "redelivered", lambda cause, _: (cause,)),
        "gpuinfer_workers_reaped_total": {(): float(seen.total("reaped"))},
        "gpuinfer_tasks_waiting": nothing
        | {tuple(lane): float(sum(levels.values())) for lane, levels in depth.lanes.items()},
        "gpuinfer_tasks_waiting_bytes": nothing
        | {tuple(lane): float(size) for lane, size in seen.list_bytes.items()},
        "gpuinfer_bodies_bytes": {(tier,): 0.0 for tier in QUEUES}
        | {(tier,): float(size) for tier, size in seen.body_bytes.items()},
        "gpuinfer_tasks_waiting_oldest_seconds": (nothing if seen.live_hosts else {})
        | {tuple(lane): age for lane, age in seen.oldest().items()},
        "gpuinfer_tasks_later": nothing | {tuple(lane): float(count) for lane, count in depth.later.items()},
        "gpuinfer_tasks_in_flight": {(): float(depth.total_inflight)},
        "gpuinfer_queue_paused": {(queue,): 1.0 for queue in depth.paused},
        "gpuinfer_dead_letters": {(): float(depth.dead_letters)},
        "gpuinfer_dead_letters_bytes": {(): float(seen.dead_bytes)},
        "gpuinfer_device_seconds_total": {labels: micros / 1e6 for labels, micros in device.items()},
    }


def _front(seen: Snapshot) -> dict[str, Values]:
    errors = _by(seen, "error", lambda code, _: (code,))
    return {
        "gpuinfer_http_requests_total": _by(seen, "status", lambda status, _: (status,)),
        "gpuinfer_http_errors_total": errors,
        "gpuinfer_tasks_refused_total": {(code,): errors.get((code,), 0.0) for code in sorted(REFUSALS)},
    }


def _models(seen: Snapshot) -> dict[str, Values]:
    serving: Values = {(model,): 0.0 for model in seen.depth.catalogue}
    for body in seen.alive.values():
        for model in body.get("models", ()):
            serving[model,] = serving.get((model,), 0.0) + 1
    return {
        "gpuinfer_model_workers": serving,
        "gpuinfer_workers_alive": {(): float(len(seen.alive))},
    }


def _redis(seen: Snapshot, host: Host) -> dict[str, Values]:
    info = {
        "gpuinfer_redis_memory_bytes": "used_memory",
        "gpuinfer_redis_memory_max_bytes": "maxmemory",
        "gpuinfer_redis_evicted_keys_total": "evicted_keys",
        "gpuinfer_redis_fsync_delayed_total": "aof_delayed_fsync",
        "gpuinfer_redis_clients": "connected_clients",
    }
    found = {name: _picked({(): seen.redis}, key) for name, key in info.items() if key in seen.redis}
    mode = host.durability if seen.redis.get("aof_enabled", 1) else "off"
    return found | ({"gpuinfer_redis_durability_info": {(mode,): 1.0}} if mode else {})


def _by(seen: Snapshot, kind: str, labels: Callable[[str, str], tuple[str, ...]]) -> Values:
    """Return the counts of one kind by these labels."""
    return {
        labels(first, second): float(count)
        for (found, first, second), count in seen.counts.items()
        if found == kind
    }


#: Histogram -> kind of its counts, and the unit of its sum.
_HISTOGRAMS = {
    "gpuinfer_task_wait_seconds": ("wait", "wait_us", 1e6),
    "gpuinfer_task_run_seconds": ("run", "run_us", 1e6),
    "gpuinfer_task_total_seconds": ("total", "total_us", 1e6),
    "gpuinfer_batch_size": ("batch", "batch_sum", 1.0),
}


def _histograms(seen: Snapshot) -> dict[str, Histograms]:
    of = {kind: name for name, (kind, _, _) in _HISTOGRAMS.items()}
    counts: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for (kind, first, second), count in seen.counts.items():
        stem, colon, number = kind.partition(":")
        if not colon or stem not in of:
            continue
        name = of[stem]
        bounds = SIZES if stem == "batch" else TIMES_S
        labels = (second,) if stem == "batch" else (first, second)
        row = counts.setdefault(name, {}).setdefault(labels, [0] * (len(bounds) + 1))
        row[min(int(number), len(bounds))] += count
    found: dict[str, Histograms] = {}
    for name, rows in counts.items():
        _, sums, unit = _HISTOGRAMS[name]
        found[name] = {
            labels: Buckets(row, seen.counts.get(_sum_key(sums, labels), 0) / unit)
            for labels, row in rows.items()
        }
    return found


def _sum_key(kind: str, labels: tuple[str, ...]) -> tuple[str, str, str]:
    first, second = labels if len(labels) == 2 else ("-", labels[0])
    return kind, first, second
