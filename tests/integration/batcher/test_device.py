# SPDX-License-Identifier: Apache-2.0
"""The batcher with a device that is lost, or hangs."""

from __future__ import annotations

import threading
import time

import pytest
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.errors import DeviceError, GpuinferError
from gpuinfer.queue.message import decode
from gpuinfer.worker import engine as engine_module
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.engine import PROBE_EVERY_S, STALLED_AFTER_S
from tests.batchers import AHEAD_S, turn
from tests.unit.test_engine import Small
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def test_a_lost_device_is_passed_on(
    batcher: Batcher, client: Client, model: Small, lost: list[GpuinferError]
) -> None:
    """A device that is gone ends the worker; the task stays in flight, for the restore."""
    model.lost = True
    task = client.submit([1.0], model="picky")
    turn(batcher, lambda: lost)
    assert not client.status(task).final
    assert batcher.store.restore().returned == 1


def test_a_lost_device_is_found_out_without_a_task(
    batcher: Batcher, client: Client, model: Small, lost: list[GpuinferError]
) -> None:
    """An idle worker ends with its GPU; what comes meanwhile is left to others, no death on its record."""
    model.lost = True
    batcher.engine.moved_at -= PROBE_EVERY_S
    batcher.tick()
    wait_until(lambda: batcher.engine.failed)
    client.submit([1.0], model="picky")
    assert batcher.channel is not None
    assert batcher.channel.claim() == 0
    with capture_logs() as logs:
        batcher.tick()
    assert [type(error) for error in lost] == [DeviceError]
    assert [line["event"] for line in logs] == ["device_lost"]
    assert model.sizes == []
    (task,) = batcher.store.claim(1)
    assert decode(task.payload).deaths == 0


def test_a_device_that_hangs_takes_no_task(batcher: Batcher, client: Client, model: Small) -> None:
    """While a probe runs, tasks wait in Redis, where others find them; what came all the same runs then."""
    go_on, begun, tried = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        go_on.wait(60)

    model.watch = hang
    batcher.engine.moved_at -= PROBE_EVERY_S
    batcher.tick()
    assert begun.wait(60)
    task = client.submit([1.0], model="picky")
    assert batcher.wants() == {}
    batcher.tick()
    assert not batcher.held()
    asked_for = batcher.store.claim(1, begin=True)
    batcher.receive(batcher.channel, asked_for)  # type: ignore[arg-type]  # all of a channel that is used
    assert batcher.held()
    assert not batcher.store.client.hexists(batcher.store.inflight, "running")
    batcher.engine.probed = tried.set
    go_on.set()
    assert tried.wait(60)
    batcher.tick()
    assert batcher.engine.current is not None, "begun at once"
    turn(batcher, lambda: client.status(task).final)
    assert client.status(task).state == "completed"


def test_what_waits_behind_a_device_that_hangs_goes_back(batcher: Batcher, client: Client) -> None:
    """It came with a claim that was on its way; after a second others may have it, no death on its record."""
    client.submit([1.0], model="picky")
    tasks = batcher.store.claim(1, begin=True)
    batcher.engine.probing, batcher.engine.moved_at = True, time.monotonic() + AHEAD_S
    batcher.receive(batcher.channel, tasks)  # type: ignore[arg-type]  # all of a channel that is used
    batcher.tick()
    assert len(batcher.held()) == 1
    batcher.engine.moved_at -= AHEAD_S + STALLED_AFTER_S
    batcher.tick()
    assert not batcher.held()
    (task,) = batcher.store.claim(1)
    assert (decode(task.payload).deaths, decode(task.payload).deliveries) == (0, 0)


def test_nothing_begins_while_a_device_is_tried(batcher: Batcher, client: Client, model: Small) -> None:
    """Neither does what waited here for its next attempt: a device that hangs would be on its account."""
    model.fits = 0
    task = client.submit([1.0], model="picky")
    turn(batcher, lambda: model.sizes and batcher.held() and batcher.engine.current is None)
    tried, batcher.engine.probing = len(model.sizes), True
    time.sleep(0.2)
    batcher.tick()
    assert batcher.engine.current is None
    assert len(model.sizes) == tried
    model.fits, batcher.engine.probing = 10, False
    turn(batcher, lambda: client.status(task).final)
    assert client.status(task).state == "completed"


def test_a_device_that_hangs_does_not_stop_a_drain(
    batcher: Batcher, model: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end waits a moment for the probe, and no longer."""
    monkeypatch.setattr(engine_module, "PROBE_PATIENCE_S", 0.05)
    go_on, over = threading.Event(), threading.Event()

    def hang() -> None:
        go_on.wait(60)
        over.set()

    model.watch = hang
    batcher.engine.moved_at -= PROBE_EVERY_S
    batcher.tick()
    batcher.drain(1.0)
    assert batcher.closed
    assert not over.is_set()
    go_on.set()
