# SPDX-License-Identifier: Apache-2.0
"""The history that watchers write: by the first of them, with the numbers that a driver made."""

from __future__ import annotations

import pytest
import redis

from gpuinfer import Client
from gpuinfer.metrics.recorder import Recorder
from gpuinfer.queue import keys, series
from gpuinfer.queue.series import COARSE, FINE
from tests.apis import HandWorker

pytestmark = pytest.mark.integration


class Clock:
    def __init__(self, client: redis.Redis) -> None:
        self.now = float(client.time()[0])

    def __call__(self) -> float:
        return self.now


def test_the_first_watcher_writes_the_history(
    client: Client, worker: HandWorker, redis_server: object
) -> None:
    """Queues, rates and workers; another host's watcher writes nothing while the first one lives."""
    raw = worker.store.client
    clock = Clock(raw)
    first, second = (Recorder(raw, host, clock) for host in ("a", "b"))
    worker.register()
    for _ in range(8):
        client.submit([1])
    worker.beat()
    for recorder in (second, first):
        recorder.step(["a", "b"])
    assert worker.finish_all([1], room=3) == 3
    clock.now += FINE.step_s
    for recorder in (second, first):
        recorder.step(["a", "b"])
    now = float(raw.time()[0])
    found = series.read_at(raw, ["waiting", "ended", "workers", "waiting:digits"], now, FINE.step_s * 2)
    assert [v for v in found.values["waiting"] if v is not None][-1] == 5
    assert found.values["waiting:digits"] == found.values["waiting"]
    assert [v for v in found.values["workers"] if v is not None][-1] == 1
    rate = next(v for v in found.values["ended"] if v is not None)
    assert rate > 3 / 30  # three tasks in less than half a minute
    assert second._before is None
    clock.now += FINE.step_s
    second.step(["b"])
    assert second._before is not None


def test_five_minutes_are_a_mean(worker: HandWorker) -> None:
    """Of what was written in them, whoever wrote it; and a decision is counted once."""
    raw = worker.store.client
    recorder = Recorder(raw, "a", Clock(raw))
    end = int(raw.time()[0]) // COARSE.step_s * COARSE.step_s
    for n in range(30):
        series.write(raw, FINE, end - COARSE.step_s + 10 * n, {"waiting": n})
    recorder.step(["a"])
    found = series.read_at(raw, ["waiting"], end - 1, COARSE.step_s, COARSE.step_s)
    assert list(found.values["waiting"]) == pytest.approx([14.5], rel=0.01)
    recorder.count("decision", "hold")
    recorder._tally._flushed_at -= 10
    recorder.step(["a"])
    recorder.step(["a"])
    assert raw.hgetall(keys.COUNTS)[b"decision hold a"] == b"1"


def test_a_full_redis_keeps_tasks_and_no_history(worker: HandWorker) -> None:
    """It is said once; nothing of it reaches the watcher."""
    raw = worker.store.client
    raw.config_set("maxmemory", 1)
    clock = Clock(raw)
    recorder = Recorder(raw, "a", clock)
    recorder.step(["a"])
    assert "maxmemory" in recorder._refused
    assert series.names(raw) == {}
    raw.config_set("maxmemory", 0)
    clock.now += FINE.step_s
    recorder.step(["a"])
    assert "waiting" in series.names(raw)
    assert not recorder._refused
