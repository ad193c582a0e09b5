# SPDX-License-Identifier: Apache-2.0
"""The batcher on a real Redis with a real model: what it claims, retries, limits, progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.errors import DeviceOutOfMemory, InferenceError, SoftTimeLimitExceeded
from gpuinfer.queue import keys
from gpuinfer.queue.message import PREDICT
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import Settings
from gpuinfer.worker import upkeep
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.pace import LONG_BATCH_S
from tests.batchers import AHEAD_S, turn
from tests.services import RedisServer
from tests.unit.test_engine import Small

pytestmark = pytest.mark.integration


def test_what_may_pass_is_tried_again(batcher: Batcher, client: Client, model: Small) -> None:
    """Out of memory with a single input: tried again after a pause, and it passes."""
    model.fits = 0
    task = client.submit([1.0], model="picky")
    turn(batcher, lambda: len(model.sizes) >= 2)
    model.fits = 10
    turn(batcher, lambda: client.status(task).final)
    assert client.status(task).state == "completed"
    assert not client.status(task).redelivered


def test_what_a_stop_gives_back_is_named(
    batcher: Batcher, client: Client, model: Small, capsys: pytest.CaptureFixture[str], settings: Settings
) -> None:
    """A task that waits for its next try goes back to its list, and the log says so."""
    model.fits = 0
    task = client.submit([1.0], model="picky")
    batcher._outcomes._settings = settings.queue.model_copy(update={"retry_backoff_s": 600.0})
    turn(batcher, lambda: model.sizes and batcher.engine.current is None, 60)
    assert len(batcher.held()) == 1
    batcher.drain(60)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "drained" in line]
    assert task in line
    assert batcher.store.client.llen("realtime") == 1


def test_retries_are_bounded(batcher: Batcher, client: Client, model: Small) -> None:
    """After max_retries it fails with the last error; an error of the input is not tried twice."""
    model.fits = 0
    task = client.submit([1.0], model="picky")
    turn(batcher, lambda: client.status(task).final)
    assert isinstance(client.status(task).error, DeviceOutOfMemory)
    assert len(model.sizes) == 3
    model.fits, model.sizes = 10, []
    bad = client.submit([-1.0], model="picky")
    turn(batcher, lambda: client.status(bad).final)
    assert isinstance(client.status(bad).error, InferenceError)
    assert model.sizes == [1]


def test_nothing_is_claimed_behind_a_long_batch(batcher: Batcher, client: Client, model: Small) -> None:
    """Another worker may be idle before it ends. Behind one that is known to be short, the next is held."""
    go_on = threading.Event()
    assert batcher.channel is not None
    client.submit([1.0], model="picky")
    turn(batcher, lambda: len(model.sizes) == 1 and batcher.engine.current is None)
    for seconds, claimed in ((0.001, 1), (2 * LONG_BATCH_S, 0)):
        batcher._pace.usual_s["picky"] = seconds
        go_on.clear()
        model.watch = lambda: go_on.wait(60)
        batcher.engine.wake = lambda: None
        client.submit([1.0], model="picky")
        batcher.channel.claim()
        assert batcher.state == "busy"
        behind = client.submit([1.0], model="picky")
        batcher.engine.began_at = time.monotonic() + AHEAD_S
        assert batcher.channel.claim() == claimed
        go_on.set()
        turn(batcher, lambda behind=behind: client.status(behind).final)  # type: ignore[misc]


def test_what_is_for_another_model_is_passed_on_while_a_batch_runs(
    batcher: Batcher, client: Client, model: Small, redis_server: RedisServer
) -> None:
    """A worker that is never idle does so, too: nobody else may live who serves what plain producers want."""
    raw = redis_server.client()
    raw.set(keys.DEFAULT_MODEL, "gone")
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    client.submit([1.0], model="picky")
    assert batcher.channel is not None
    batcher.channel.claim()
    assert batcher.engine.current is not None
    raw.lpush("realtime", Submission(task=PREDICT, inputs=[2.0], queue="realtime", model="picky").encode())
    batcher._upkeep._routed_at -= upkeep.ROUTE_EVERY_S
    batcher.tick()
    assert (raw.llen("realtime"), raw.llen("realtime.picky")) == (0, 1)
    go_on.set()
    turn(batcher, lambda: sum(model.sizes) == 2)


class Watch:
    """A deadline on a device where each pass takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, soft_s: float, hard_s: float, call: Callable[[], Any], about: object = None) -> Any:
        if soft_s < self._seconds:
            raise SoftTimeLimitExceeded(f"ran longer than its soft limit of {soft_s:g} s")
        return call()


def test_requests_with_their_own_limits_run_together(batcher: Batcher, client: Client, model: Small) -> None:
    """64 of them, no two alike, are one pass."""
    tasks = [client.submit([1.0], model="picky", soft_time_limit_s=8 + n / 10) for n in range(64)]
    turn(batcher, lambda: all(client.status(task).final for task in tasks))
    assert model.sizes == [64]


def test_a_neighbours_smaller_limit_fails_nobody(batcher: Batcher, client: Client, model: Small) -> None:
    """A pass that was too slow for the smallest limit is run again, each task alone and under its own: also
    those that the device had no memory for at once."""
    batcher.engine._deadline = Watch(12.0)  # type: ignore[assignment]
    model.fits = 2
    limits = [8.5, 15.0, 14.0, 9.0, 13.0]
    tasks = [client.submit([1.0], model="picky", soft_time_limit_s=limit) for limit in limits]
    turn(batcher, lambda: all(client.status(task).final for task in tasks))
    assert [client.status(task).state for task in tasks] == [
        "completed" if limit > 12 else "failed" for limit in limits
    ]
    assert model.sizes == [1, 1, 1]


def test_how_far_a_task_is_is_in_its_state(batcher: Batcher, client: Client, model: Small) -> None:
    """While it runs, where its model tells; written once a second at most."""
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    task = client.submit([1.0], model="picky")
    assert batcher.channel is not None
    batcher.channel.claim()
    assert batcher.engine.current is not None
    (running,) = batcher.engine.current.tasks
    assert running.time_start is not None
    running.time_start -= 1
    batcher.tick()
    assert client.status(task).to_dict().keys() == {"task_id", "status", "worker"}
    running.progress = 0.25
    now = time.time() + 60
    batcher._outbox._progress_at = now  # as after a write just now, by any clock
    batcher._wall = lambda: now
    batcher.tick()
    assert client.status(task).progress is None
    batcher._outbox._progress_at -= 60
    batcher.tick()
    assert client.status(task).to_dict()["progress"] == 0.25
    go_on.set()
    turn(batcher, lambda: client.status(task).final, 60)
    assert client.status(task).progress is None
