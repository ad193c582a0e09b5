# SPDX-License-Identifier: Apache-2.0
"""The history that watchers write: by the first of them, with the numbers that a driver made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import redis

from gpuinfer import Client
from gpuinfer.metrics import recorder as recording
from gpuinfer.metrics.gather import Snapshot, gather
from gpuinfer.metrics.recorder import Recorder
from gpuinfer.queue import keys, series
from gpuinfer.queue.series import COARSE, FINE
from tests.apis import HandWorker

pytestmark = pytest.mark.integration


class Clock:
    """This host's, and Redis's as far as what is looked at tells it."""

    def __init__(self, client: redis.Redis) -> None:
        self.now = float(client.time()[0])

    def gather(self, client: redis.Redis, **options: Any) -> Snapshot:
        return replace(gather(client, **options), now=self.now)

    def __call__(self) -> float:
        return self.now


def test_the_first_watcher_writes_the_history(
    client: Client, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queues, rates and workers; another host's watcher writes nothing while the first one lives."""
    raw = worker.store.client
    clock = Clock(raw)
    clock.now = clock.now // FINE.step_s * FINE.step_s + 3  # most of what is counted is in this step
    monkeypatch.setattr(recording, "gather", clock.gather)
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
    found = series.read_at(raw, ["waiting", "ended", "workers", "waiting:digits"], clock.now, FINE.step_s * 2)
    assert [v for v in found.values["waiting"] if v is not None][-1] == 5
    assert found.values["waiting:digits"] == found.values["waiting"]
    assert [v for v in found.values["workers"] if v is not None][-1] == 1
    rate = next(v for v in found.values["ended"] if v is not None)
    assert rate > 3 / 30  # three tasks in less than half a minute
    assert second._slot == -1
    clock.now += FINE.step_s
    second.step(["b"])
    assert second._slot != -1


def test_it_adds_up_to_what_a_driver_submitted(
    client: Client, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: each end and each refusal is in one step, however late the looks are, and whoever looks."""
    raw = worker.store.client
    clock = Clock(raw)
    start = clock.now = clock.now // FINE.step_s * FINE.step_s + 3
    monkeypatch.setattr(recording, "gather", clock.gather)
    worker.register()
    submitted = dict.fromkeys(("ended", "failed", "requests", "refused"), 0)

    def drive(done: int, failed: int, refused: int) -> None:
        client.submit_many([[1]] * (done + failed))
        for outcome, count in ((ValueError("no digit"), failed), ([1], done)):
            assert worker.finish_all(outcome, room=count) == count
        raw.hincrby(keys.COUNTS, "status 202 -", done + failed)
        raw.hincrby(keys.COUNTS, "error queue_full -", refused)
        for name, count in zip(submitted, (done + failed, failed, done + failed, refused), strict=True):
            submitted[name] += count

    Recorder(raw, "a", clock).step(["a", "b"])
    for host, seconds, driven in (
        ("a", 10.0, (40, 3, 1)),
        ("a", 12.7, (517, 0, 0)),
        ("a", 8.1, (0, 0, 0)),
        ("a", 31.4, (77, 19, 2)),
        ("b", 11.3, (5, 1, 301)),
        ("b", 9.9, (250, 2, 7)),
        ("b", 25.0, (0, 0, 0)),
    ):
        if any(driven):
            drive(*driven)
        clock.now += seconds
        Recorder(raw, host, clock).step([host])
    names = [*submitted, "ended:digits", "failed:digits"]
    found = series.read_at(raw, names, clock.now, clock.now - start + FINE.step_s)
    sums = {name: round(FINE.step_s * sum(v or 0.0 for v in found.values[name])) for name in names}
    assert sums == submitted | {f"{name}:digits": submitted[name] for name in ("ended", "failed")}
    assert [v is None for v in found.values["ended"]] == [False] * (len(found.values["ended"]) - 1) + [True]


def test_five_minutes_are_a_mean(worker: HandWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was written in them, whoever wrote it; and a decision is counted once."""
    raw = worker.store.client
    clock = Clock(raw)
    monkeypatch.setattr(recording, "gather", clock.gather)
    recorder = Recorder(raw, "a", clock)
    end = int(clock.now) // COARSE.step_s * COARSE.step_s
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


def test_what_is_refused_is_counted_at_the_next_look(
    worker: HandWorker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates of the steps that are over, and the mean of five minutes."""
    raw = worker.store.client
    clock = Clock(raw)
    start = clock.now = clock.now // COARSE.chunk_s * COARSE.chunk_s + COARSE.step_s + 3
    monkeypatch.setattr(recording, "gather", clock.gather)
    worker.register()
    recorder = Recorder(raw, "a", clock)
    fine = f"{series._prefix(FINE, int(start) // FINE.chunk_s)}ended"
    coarse = f"{series._prefix(COARSE, int(start) // COARSE.chunk_s)}waiting"
    series.write(raw, FINE, start - 20, {"waiting": 7})
    raw.rpush(coarse, "not a series")
    recorder.step(["a"])
    assert "WRONGTYPE" in recorder._refused
    client.submit_many([[1]] * 3)
    assert worker.finish_all([1], room=3) == 3
    raw.rpush(fine, "not a series")
    clock.now += FINE.step_s
    recorder.step(["a"])
    raw.delete(fine, coarse)
    clock.now += FINE.step_s
    recorder.step(["a"])
    assert not recorder._refused
    clock.now += FINE.step_s
    recorder.step(["a"])
    ended = series.read_at(raw, ["ended"], clock.now, clock.now - start + FINE.step_s).values["ended"]
    assert round(FINE.step_s * sum(value or 0.0 for value in ended)) == 3
    found = series.read_at(raw, ["waiting"], start - COARSE.step_s, COARSE.step_s, COARSE.step_s)
    assert found.values["waiting"] == (7,)


def test_what_somebody_else_has_written_there_fails_no_probe(worker: HandWorker) -> None:
    """It is put right: alerts come after it."""
    raw = worker.store.client
    raw.set(keys.SERIES_STATE, b'{"at": "now"}')
    raw.hset(keys.SERIES, "other", "long ago")
    Recorder(raw, "a", Clock(raw)).step(["a"])
    names = series.names(raw)
    assert "waiting" in names and "other" not in names
