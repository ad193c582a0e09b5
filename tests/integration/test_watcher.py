# SPDX-License-Identifier: Apache-2.0
"""The watcher at work, with real workers as plain processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from gpuinfer import Client
from gpuinfer.queue import heartbeats, keys
from gpuinfer.queue.connection import connect
from gpuinfer.settings import Settings
from gpuinfer.watcher.notes import DECISIONS
from gpuinfer.watcher.state import Key
from tests.models_for_tests import sleeper
from tests.services import Process, RedisServer, whole_lines
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.integration
Build = Callable[..., Settings]
WATCHER = {
    "watcher_backend": "process",
    "watcher_instances": 2,
    "watcher_cooldown_s": 2,
    "watcher_cooldown_max_s": 2,
    "watcher_probe_interval_s": 0.2,
    "watcher_assumed_rate": 1,
    "worker_device": "cpu",
    "worker_models": "slow",
}


@pytest.fixture
def workers(redis_server: RedisServer, tmp_path: Path) -> Iterator[Workers]:
    sleeper(tmp_path / "models" / "slow", 0.3, max_batch_size=1)
    made = Workers(redis_server, tmp_path)
    yield made
    made.close()


def watch(workers: Workers, *more: str, **settings: object) -> Process:
    """Start a watcher of two processes."""
    command = [sys.executable, "-m", "gpuinfer", "watcher", "run", *more]
    return workers.spawn(*command, name="watcher", **{**WATCHER, **settings})


def lines(workers: Workers, action: str) -> list[dict[str, object]]:
    """Return the watcher's log lines of an action."""
    text = (workers.folder / "watcher.log").read_text()
    entries = [orjson.loads(line) for line in whole_lines(text) if line.startswith("{")]
    return [entry for entry in entries if entry.get("action") == action]


def children(process: Process) -> list[int]:
    """Return the processes that a watcher has started and that live."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_burst_is_served_and_the_fleet_goes_back_to_zero(
    workers: Workers, redis_server: RedisServer, settings_for: Build
) -> None:
    """Two workers for a burst, none after its cooldown, no task lost; each decision logged once and kept."""
    watcher = watch(workers)
    watcher.wait_for_line('"watching"')
    with Client(settings_for(redis_server)) as client:
        ids = client.submit_many([[float(n)] for n in range(30)], model="slow")  # no look sees but a part
        assert len([client.result(one, timeout_s=60) for one in ids]) == 30
    wait_until(lambda: not children(watcher), 60)
    up, down = lines(workers, "scale_up"), lines(workers, "scale_down")
    both = [str(Key(number, os.uname().nodename)) for number in (0, 1)]
    assert up[0]["actions"] == f"start {both[0]}, start {both[1]}"
    assert "30 tasks wait in realtime" in str(up[0]["why"])
    stopped = [action for entry in down for action in str(entry["actions"]).split(", ")]
    assert sorted(stopped) == [f"stop {one}" for one in both]
    kept = [
        orjson.loads(text) for text in connect(settings_for(redis_server).broker).lrange(DECISIONS, 0, -1)
    ]
    done = [entry["verdict"] for entry in kept if entry["actions"]]
    assert done == [*["scale_down"] * len(down), "scale_up"]
    assert watcher.terminate() == 0


def test_killed_in_mid_scale_it_comes_to_the_same_fleet(
    workers: Workers, redis_server: RedisServer, settings_for: Build
) -> None:
    """SIGKILL between start and ready: its processes end, the next watcher starts them again."""
    first = watch(workers)
    with Client(settings_for(redis_server)) as client:
        ids = [client.submit([float(n)], model="slow") for n in range(20)]
        wait_until(lambda: len(children(first)) == 2, 60)
        orphans = children(first)
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in orphans), 60)
        second = watch(workers)
        assert len([client.result(one, timeout_s=60) for one in ids]) == 20
    assert second.terminate() == 0


def test_dry_run_only_logs(workers: Workers, redis_server: RedisServer, settings_for: Build) -> None:
    """It says once what it would do, and starts nothing."""
    watcher = watch(workers, "--dry-run")
    with Client(settings_for(redis_server)) as client:
        client.submit([1.0], model="slow")
    watcher.wait_for_line('"scale_up"')
    wait_until(lambda: len(lines(workers, "scale_up")) == 1, 60)
    assert lines(workers, "scale_up")[0]["done"] is False
    assert children(watcher) == []


def test_dry_run_leaves_the_service_alone(
    workers: Workers, redis_server: RedisServer, settings_for: Build
) -> None:
    """It neither tells the other hosts anything, nor keeps anything: what the service says stays."""
    client = connect(settings_for(redis_server).broker)
    watcher = watch(workers, "--dry-run")
    with Client(settings_for(redis_server)) as submitter:
        submitter.submit([1.0], model="slow")
    watcher.wait_for_line('"scale_up"')
    time.sleep(1)
    assert client.keys("gpuinfer:watcher:*") == []
    assert watcher.terminate() == 0


def test_each_worker_is_started_for_what_it_serves(
    workers: Workers, redis_server: RedisServer, settings_for: Build
) -> None:
    """Two real workers: one for realtime tasks of one model, one for another model. Each has its own backlog.

    What is left over, batch tasks of the first model, waits for nobody, and is said once.
    """
    sleeper(workers.folder / "models" / "quick", 0.05, max_batch_size=1)
    (workers.folder / "gpuinfer.toml").write_text("")
    (workers.folder / "worker@0.env").write_text("GPUINFER_WORKER_QUEUES=realtime\n")
    (workers.folder / "worker@1.env").write_text('# another model\nGPUINFER_WORKER_MODELS="quick"\n')
    # None is stopped again before it was asked what it serves, however late that is.
    idle = {"watcher_cooldown_s": 600, "watcher_cooldown_max_s": 600}
    watcher = watch(workers, config=workers.folder / "gpuinfer.toml", watcher_floor=0, **idle)
    watcher.wait_for_line('"watching"')
    settings = settings_for(redis_server)
    redis = connect(settings.broker)
    wait_until(lambda: redis.zcard(keys.CATALOGUE) == 2, 60)
    with Client(settings) as client:
        lost = client.submit([1.0], model="slow", queue="batch")
        ids = [client.submit([float(n)], model="quick", queue="batch") for n in range(5)]
        assert len([client.result(one, timeout_s=60) for one in ids]) == 5
        started = [str(entry["actions"]) for entry in lines(workers, "scale_up")]
        assert started == [f"start {Key(1, os.uname().nodename)}"]
        client.result(client.submit([1.0], model="slow", queue="realtime"), timeout_s=60)
        beats = heartbeats.fresh(redis)
        said = {name.partition("@")[0]: (body["queues"], body["models"]) for name, body in beats.items()}
        assert said["gpu0"] == (["realtime"], ["slow"])
        watcher.wait_for_line('"no-worker.batch.slow"')
        [warned] = [one for one in lines(workers, "alert_began") if one["alert"] == "no-worker.batch.slow"]
        assert warned["reason"] == "1 task waits in batch for slow, which no worker serves"
        client.cancel(lost)
    assert watcher.terminate() == 0
