# SPDX-License-Identifier: Apache-2.0
"""Workers under other hosts' names, and what lies at workers that are gone."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from gpuinfer import Client
from gpuinfer.queue import keys
from gpuinfer.queue.orphans import holders
from tests.services import Process, RedisServer
from tests.workers import Workers, wait_until

#: A watcher of one plain process, which gives other hosts up as soon as is allowed.
WATCHER = {
    "watcher_backend": "process",
    "watcher_instances": 1,
    "watcher_probe_interval_s": 0.2,
    "watcher_quarantine_s": 1,
    "watcher_cooldown_s": 600,
    "watcher_cooldown_max_s": 600,
    "watcher_reap_after_s": 10,
    "worker_device": "cpu",
    "worker_models": "slow",
}


def watch(workers: Workers, name: str = "watcher", **settings: object) -> Process:
    """Start a watcher, and wait until it looks."""
    command = [sys.executable, "-m", "gpuinfer", "watcher", "run"]
    process = workers.spawn(*command, name=name, **{**WATCHER, **settings})
    process.wait_for_line('"watching"')
    return process


def elsewhere(workers: Workers, host: str, **settings: object) -> Process:
    """Start a worker as it runs on another host, with a folder of locks of its own; wait until it serves."""
    command = [sys.executable, "-m", "celery", "-A", "gpuinfer.celery", "worker", "-n", f"gpu0@{host}"]
    chosen = {"worker_models": "slow", "worker_run_dir": workers.folder / host, **settings}
    process = workers.spawn(*command, "-P", "solo", name=host, **chosen)
    process.wait_for_line('"worker_ready"')
    return process


def gpuinfer(workers: Workers, *arguments: str, **settings: object) -> tuple[int, Any]:
    """Run a command with --json; return its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "gpuinfer", *arguments, "--json"],
        env=workers.environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def held(server: RedisServer) -> dict[str, int]:
    """Return worker -> tasks in flight."""
    with server.client() as client:
        return {one.worker: one.tasks for one in holders(client)}


def wait_for_batch(server: RedisServer, worker: str, tasks: int) -> None:
    """Wait until a worker holds this many tasks, and runs some of them."""
    with server.client() as client:
        wait_until(lambda: held(server).get(worker) == tasks, 60)
        wait_until(lambda: client.hexists(keys.inflight(worker), "running"), 60)


def ends(server: RedisServer) -> dict[str, int]:
    """Return outcome -> how many tasks of the model ``slow`` ended so."""
    with server.client() as client:
        counts: dict[bytes, bytes] = client.hgetall(keys.ENDED)
    found: dict[str, int] = {}
    for label, count in counts.items():
        outcome, *_, model = label.decode().split(" ")
        if model == "slow" and outcome != "bytes":
            found[outcome] = found.get(outcome, 0) + int(count)
    return found


def submit(client: Client, tasks: int) -> list[str]:
    """Submit inputs that take the model ``slow`` its time."""
    return client.submit_many([[1.0 + n] for n in range(tasks)], model="slow")


def check(client: Client, ids: list[str]) -> None:
    """See that each task submitted by ``submit`` has ended with its own result."""
    answers = client.results(ids, timeout_s=120)
    assert [answer["outputs"]["twice"] for answer in answers] == [[2.0 + 2 * n] for n in range(len(ids))]
