# SPDX-License-Identifier: Apache-2.0
"""Every metric: its name, kind, labels and meaning. ``collector`` exposes these and no others.

Names follow Prometheus: the unit as a suffix (seconds, bytes, celsius, ratio), and ``_total`` for counters.
``python -m gpuinfer.metrics.table`` prints the table of the manual.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["gauge", "counter", "histogram"]
#: Which host exposes it. ``fleet``: only Redis's host, so that nothing counts twice; ``host``: each its own.
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
        "gpuinfer_redis_up",
        "gauge",
        "1 if Redis answers; 0 if not, and most other metrics are missing then.",
        (),
        "host",
    ),
    Metric(
        "gpuinfer_build_info", "gauge", "Always 1; the label has gpuinfer's version.", ("version",), "host"
    ),
    # -- tasks
    Metric(
        "gpuinfer_tasks_submitted_total",
        "counter",
        "Tasks submitted by gpuinfer's API, clients and commands.",
        _LANE,
    ),
    Metric(
        "gpuinfer_tasks_finished_total",
        "counter",
        "Ended tasks: completed, failed, expired, cancelled, dead (letter), not_run (failed chain).",
        (*_LANE, "outcome"),
    ),
    Metric("gpuinfer_result_bytes_total", "counter", "Bytes of stored results.", _LANE),
    Metric(
        "gpuinfer_tasks_redelivered_total",
        "counter",
        "Tasks returned to their queue after a worker died.",
        ("cause",),
    ),
    Metric("gpuinfer_workers_reaped_total", "counter", "Workers declared dead by the reaper."),
    Metric("gpuinfer_tasks_waiting", "gauge", "Tasks waiting in a queue.", _LANE),
    Metric(
        "gpuinfer_tasks_waiting_bytes",
        "gauge",
        "Bytes of waiting tasks without large bodies (estimate).",
        _LANE,
    ),
    Metric("gpuinfer_bodies_bytes", "gauge", "Bytes of the large bodies of unfinished tasks.", ("queue",)),
    Metric("gpuinfer_tasks_waiting_oldest_seconds", "gauge", "Age of the oldest waiting task.", _LANE),
    Metric("gpuinfer_tasks_later", "gauge", "Tasks scheduled for a later time (ETA).", _LANE),
    Metric("gpuinfer_tasks_in_flight", "gauge", "Tasks claimed by workers and not ended."),
    Metric(
        "gpuinfer_queue_paused",
        "gauge",
        "1 if the queue is paused: workers claim nothing from it.",
        ("queue",),
    ),
    Metric("gpuinfer_dead_letters", "gauge", "Dead letters: tasks set aside after they killed workers."),
    Metric("gpuinfer_dead_letters_bytes", "gauge", "Bytes of dead letters."),
    Metric("gpuinfer_task_wait_seconds", "histogram", "Time from submission to the first batch.", _LANE),
    Metric("gpuinfer_task_run_seconds", "histogram", "Time in batches, per task.", _LANE),
    Metric("gpuinfer_task_total_seconds", "histogram", "Time from submission to the end.", _LANE),
    Metric("gpuinfer_batch_size", "histogram", "Inputs per batch.", ("model",)),
    Metric(
        "gpuinfer_device_seconds_total",
        "counter",
        "Device time by model and by API key (-: no key); a batch's time is divided among its inputs.",
        ("model", "key"),
    ),
    # -- front
    Metric("gpuinfer_http_requests_total", "counter", "HTTP requests answered by the API.", ("status",)),
    Metric(
        "gpuinfer_http_errors_total", "counter", "HTTP requests answered with an error, by code.", ("code",)
    ),
    Metric(
        "gpuinfer_tasks_refused_total",
        "counter",
        "Submissions refused for lack of capacity (429, 503).",
        ("reason",),
    ),
    # -- models and workers
    Metric("gpuinfer_model_workers", "gauge", "Live workers that serve the model.", ("model",)),
    Metric("gpuinfer_workers_alive", "gauge", "Workers with a recent heartbeat."),
    Metric("gpuinfer_worker_up", "gauge", "1 if the worker has a recent heartbeat.", ("worker",), "host"),
    Metric(
        "gpuinfer_worker_busy_ratio",
        "gauge",
        "Busy share of its device in the last 5 s.",
        ("worker",),
        "host",
    ),
    Metric("gpuinfer_worker_tasks_per_second", "gauge", "Tasks ended per second.", ("worker",), "host"),
    Metric("gpuinfer_worker_tasks_total", "counter", "Tasks ended since its start.", ("worker",), "host"),
    Metric("gpuinfer_worker_in_flight", "gauge", "Tasks claimed and not ended.", ("worker",), "host"),
    Metric("gpuinfer_worker_load_seconds", "gauge", "Time its models took to load.", ("worker",), "host"),
    Metric("gpuinfer_worker_memory_bytes", "gauge", "Resident memory of the process.", ("worker",), "host"),
    Metric(
        "gpuinfer_worker_device_memory_bytes", "gauge", "Device memory held by torch.", ("worker",), "host"
    ),
    # -- GPUs
    Metric("gpuinfer_gpu_temperature_celsius", "gauge", "Temperature of a GPU.", ("gpu",), "host"),
    Metric(
        "gpuinfer_gpu_busy_ratio", "gauge", "Share of time the GPU was busy, from NVML.", ("gpu",), "host"
    ),
    Metric("gpuinfer_gpu_memory_used_bytes", "gauge", "Used memory of a GPU.", ("gpu",), "host"),
    Metric("gpuinfer_gpu_memory_total_bytes", "gauge", "Total memory of a GPU.", ("gpu",), "host"),
    Metric("gpuinfer_gpu_xids_total", "counter", "Xid errors seen by the watcher.", ("gpu", "xid"), "host"),
    # -- watcher
    Metric("gpuinfer_watcher_up", "gauge", "1 if this host's watcher has reported recently.", (), "host"),
    Metric("gpuinfer_watcher_desired_workers", "gauge", "Workers that it wants in the fleet.", (), "host"),
    Metric("gpuinfer_watcher_running_workers", "gauge", "Running workers of this host.", (), "host"),
    Metric("gpuinfer_watcher_instances", "gauge", "Worker instances of this host.", (), "host"),
    Metric("gpuinfer_watcher_quarantined", "gauge", "Instances cooling down after failures.", (), "host"),
    Metric(
        "gpuinfer_watcher_decisions_total",
        "counter",
        "Scaling decisions, counted when they change.",
        ("verdict",),
        "host",
    ),
    # -- Redis and disk
    Metric("gpuinfer_redis_memory_bytes", "gauge", "Memory used by Redis."),
    Metric("gpuinfer_redis_memory_max_bytes", "gauge", "Memory limit of Redis (maxmemory); 0: none."),
    Metric("gpuinfer_redis_evicted_keys_total", "counter", "Keys evicted by Redis because it was full."),
    Metric(
        "gpuinfer_redis_fsync_delayed_total",
        "counter",
        "Writes delayed by a slow disk (appendfsync everysec).",
    ),
    Metric("gpuinfer_redis_clients", "gauge", "Connections to Redis."),
    Metric(
        "gpuinfer_redis_durability_info",
        "gauge",
        "Always 1; the label has Redis's appendfsync mode.",
        ("appendfsync",),
    ),
    Metric("gpuinfer_disk_free_bytes", "gauge", "Free bytes on the disk of a folder.", ("folder",), "host"),
    Metric("gpuinfer_disk_size_bytes", "gauge", "Size of that disk.", ("folder",), "host"),
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
