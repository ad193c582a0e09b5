# SPDX-License-Identifier: Apache-2.0
"""Every metric: its name, kind, labels and meaning. ``collector`` shows these and no others.

Names follow Prometheus: a unit as the suffix (seconds, bytes, celsius, ratio), ``_total`` for what only
grows.
``python -m gpuinfer.metrics.table`` prints the table of the manual.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["gauge", "counter", "histogram"]
#: Who shows it: ``fleet``: Redis's host alone, so that nothing counts twice; ``host``: each host, of its own.
Scope = Literal["fleet", "host"]


class Metric(NamedTuple):
    """One metric."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    scope: Scope = "fleet"


_LANE = ("queue", "model")

METRICS: tuple[Metric, ...] = (
    Metric(
        "gpuinfer_redis_up", "gauge", "1 where Redis answers; without it all else is missing.", (), "host"
    ),
    Metric("gpuinfer_build_info", "gauge", "Always 1; the version is in its label.", ("version",), "host"),
    # -- tasks
    Metric("gpuinfer_tasks_submitted_total", "counter", "Tasks that our clients have submitted.", _LANE),
    Metric(
        "gpuinfer_tasks_finished_total",
        "counter",
        "Tasks that have ended: completed, failed, expired, cancelled, dead, not_run (of a chain).",
        (*_LANE, "outcome"),
    ),
    Metric("gpuinfer_result_bytes_total", "counter", "Bytes of the results that were kept.", _LANE),
    Metric("gpuinfer_tasks_redelivered_total", "counter", "Tasks put back after a worker died.", ("cause",)),
    Metric("gpuinfer_workers_reaped_total", "counter", "Times that a reaper took a worker for dead."),
    Metric("gpuinfer_tasks_waiting", "gauge", "Tasks that wait in a queue.", _LANE),
    Metric(
        "gpuinfer_tasks_waiting_bytes", "gauge", "Bytes of what waits, about; without large bodies.", _LANE
    ),
    Metric(
        "gpuinfer_bodies_bytes", "gauge", "Bytes of large bodies of tasks that have not ended.", ("queue",)
    ),
    Metric("gpuinfer_tasks_waiting_oldest_seconds", "gauge", "How long the oldest has waited.", _LANE),
    Metric("gpuinfer_tasks_later", "gauge", "Tasks that wait for their time (ETA).", _LANE),
    Metric("gpuinfer_tasks_in_flight", "gauge", "Tasks that workers have claimed and not ended."),
    Metric("gpuinfer_queue_paused", "gauge", "1 where nothing is claimed until it is resumed.", ("queue",)),
    Metric("gpuinfer_dead_letters", "gauge", "Tasks set aside after they took workers down."),
    Metric("gpuinfer_dead_letters_bytes", "gauge", "Their bytes."),
    Metric("gpuinfer_task_wait_seconds", "histogram", "From a client of ours to the first batch.", _LANE),
    Metric("gpuinfer_task_run_seconds", "histogram", "Time in batches.", _LANE),
    Metric("gpuinfer_task_total_seconds", "histogram", "From a client of ours to the end.", _LANE),
    Metric("gpuinfer_batch_size", "histogram", "Inputs of a batch.", ("model",)),
    Metric(
        "gpuinfer_device_seconds_total",
        "counter",
        "Device time, a batch's divided among its inputs, by the key that submitted them (-: none).",
        ("model", "key"),
    ),
    # -- front
    Metric("gpuinfer_http_requests_total", "counter", "Requests that the fronts have answered.", ("status",)),
    Metric("gpuinfer_http_errors_total", "counter", "Requests answered with an error.", ("code",)),
    Metric("gpuinfer_tasks_refused_total", "counter", "Submissions without room (429, 503).", ("reason",)),
    # -- models and workers
    Metric("gpuinfer_model_workers", "gauge", "Live workers that serve a model the fleet knows.", ("model",)),
    Metric("gpuinfer_workers_alive", "gauge", "Workers whose heartbeat is fresh."),
    Metric("gpuinfer_worker_up", "gauge", "1 while a worker's heartbeat is fresh.", ("worker",), "host"),
    Metric("gpuinfer_worker_busy_ratio", "gauge", "Share of 5 s that its device ran.", ("worker",), "host"),
    Metric("gpuinfer_worker_tasks_per_second", "gauge", "Tasks it has ended a second.", ("worker",), "host"),
    Metric("gpuinfer_worker_tasks_total", "counter", "Tasks its process has ended.", ("worker",), "host"),
    Metric("gpuinfer_worker_in_flight", "gauge", "Tasks it holds.", ("worker",), "host"),
    Metric("gpuinfer_worker_load_seconds", "gauge", "How long its models took to load.", ("worker",), "host"),
    Metric("gpuinfer_worker_memory_bytes", "gauge", "Resident memory of its process.", ("worker",), "host"),
    Metric("gpuinfer_worker_device_memory_bytes", "gauge", "What torch holds there.", ("worker",), "host"),
    # -- GPUs
    Metric("gpuinfer_gpu_temperature_celsius", "gauge", "Temperature of a GPU.", ("gpu",), "host"),
    Metric(
        "gpuinfer_gpu_busy_ratio", "gauge", "Share of the time that NVML saw work on it.", ("gpu",), "host"
    ),
    Metric("gpuinfer_gpu_memory_used_bytes", "gauge", "Memory in use on a GPU.", ("gpu",), "host"),
    Metric("gpuinfer_gpu_memory_total_bytes", "gauge", "Memory of a GPU.", ("gpu",), "host"),
    Metric(
        "gpuinfer_gpu_xids_total", "counter", "Xid errors that the watcher heard of.", ("gpu", "xid"), "host"
    ),
    # -- watcher
    Metric("gpuinfer_watcher_up", "gauge", "1 while this host's watcher tells of itself.", (), "host"),
    Metric("gpuinfer_watcher_desired_workers", "gauge", "Workers it wants in the fleet.", (), "host"),
    Metric("gpuinfer_watcher_running_workers", "gauge", "Workers of this host that run.", (), "host"),
    Metric("gpuinfer_watcher_instances", "gauge", "Instances of this host.", (), "host"),
    Metric("gpuinfer_watcher_quarantined", "gauge", "Instances that cool down after failures.", (), "host"),
    Metric(
        "gpuinfer_watcher_decisions_total", "counter", "Its decisions that were new.", ("verdict",), "host"
    ),
    # -- Redis and disk
    Metric("gpuinfer_redis_memory_bytes", "gauge", "Memory that Redis uses."),
    Metric("gpuinfer_redis_memory_max_bytes", "gauge", "maxmemory; 0: none."),
    Metric("gpuinfer_redis_evicted_keys_total", "counter", "Keys that a full Redis has dropped."),
    Metric("gpuinfer_redis_fsync_delayed_total", "counter", "Writes that waited for the disk (everysec)."),
    Metric("gpuinfer_redis_clients", "gauge", "Connections."),
    Metric("gpuinfer_redis_durability_info", "gauge", "1; how the file is written.", ("appendfsync",)),
    Metric(
        "gpuinfer_disk_free_bytes", "gauge", "Free where models and Redis's file lie.", ("folder",), "host"
    ),
    Metric("gpuinfer_disk_size_bytes", "gauge", "Size of that file system.", ("folder",), "host"),
)


def markdown() -> str:
    """Return the table of the manual."""
    rows = ["| name | kind | labels | from | meaning |", "|---|---|---|---|---|"]
    for one in METRICS:
        where = "Redis's host" if one.scope == "fleet" else "each host"
        labels = ", ".join(one.labels)
        rows.append(f"| `{one.name}` | {one.kind} | {labels} | {where} | {one.help} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
