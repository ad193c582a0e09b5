# SPDX-License-Identifier: Apache-2.0
"""The record of what runs: who a crash of the worker is charged to."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.errors import GpuinferError
from gpuinfer.queue import keys
from gpuinfer.queue.message import decode
from gpuinfer.worker import outcomes as outcomes_module
from gpuinfer.worker.batcher import Batcher
from tests.batchers import AHEAD_S, turn
from tests.services import RedisServer
from tests.unit.test_engine import Small
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def test_nothing_runs_that_is_not_on_record(batcher: Batcher, client: Client, model: Small) -> None:
    """Each batch that begins is on record, noted by its claim or by itself, and is wiped when it ends."""
    seen: list[bytes | str | None] = []
    model.watch = lambda: seen.append(batcher.store.client.hget(batcher.store.inflight, "running"))
    for count in (1, 2, 1):
        tasks = [client.submit([1.0], model="picky") for _ in range(count)]
        turn(batcher, lambda tasks=tasks: all(client.status(task).final for task in tasks))  # type: ignore[misc]
        assert not batcher.store.client.exists(batcher.store.inflight)
    assert [len((record or "").split()) for record in seen] == [1, 2, 1]


def test_what_does_not_begin_is_not_on_record(
    batcher: Batcher, client: Client, model: Small, redis_server: RedisServer
) -> None:
    """A task that was noted by its claim, but waits or has expired, has no share in a death."""
    assert batcher.channel is not None
    client.submit([1.0], model="picky", expires_s=0.01)
    time.sleep(0.02)
    batcher.channel.claim()
    assert not batcher.store.client.exists(batcher.store.inflight)
    bare = Celery("bare", broker=f"redis+socket://{redis_server.socket}", set_as_current=False)
    bare.send_task("gpuinfer.predict", [[1.0]], {"model": "picky"}, queue="realtime", countdown=60)
    wait_until(batcher.channel.claim)
    assert not batcher.held()
    assert not batcher.store.client.exists(batcher.store.inflight)
    assert batcher.store.client.exists(keys.later("realtime"))
    assert model.sizes == []


def test_a_batch_that_cannot_be_finished_ends_the_worker(
    batcher: Batcher, client: Client, lost: list[GpuinferError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours ends the process as a death of what ran: not for ever, and nothing is in between."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(outcomes_module, "conclude", broken)
    task = client.submit([1.0], model="picky")
    turn(batcher, lambda: lost)
    assert "ZeroDivisionError" in str(lost[0])
    batcher.drain(1.0, crashed=True)
    assert batcher.store.restore().returned == 1
    (again,) = batcher.store.claim(1)
    assert decode(again.payload).deaths == 1
    assert not client.status(task).final


def test_an_orderly_end_is_on_nobodys_account(batcher: Batcher, client: Client) -> None:
    """What is handed back when the worker ends in order has no death on its record."""
    assert batcher.channel is not None
    client.submit([1.0], model="picky")
    batcher.channel.claim()
    batcher.drain(1.0)
    assert not batcher.store.client.exists(batcher.store.inflight)


def test_what_is_still_prepared_is_not_given_away(batcher: Batcher, client: Client, model: Small) -> None:
    """Withdrawn behind a slow batch, and at a stop: while a thread is in there, a death is on its account.
    It goes back at the end, with no death on its record."""
    go_on, begun, slow, plain = threading.Event(), threading.Event(), threading.Event(), model.prepare

    def prepare(values: Any) -> Any:
        if list(values) == [[7.0]]:
            begun.set()
            slow.wait(60)
        return plain(values)

    model.prepares, model.prepare = True, prepare
    model.prepares_these = lambda values: True
    model.watch = lambda: go_on.wait(60)
    assert batcher.channel is not None
    batcher._pace.usual_s["picky"] = 0.001
    first = client.submit([1.0], model="picky")
    batcher.channel.claim()
    batcher.engine.began_at = time.monotonic() + AHEAD_S
    later = client.submit([7.0], model="picky")
    assert batcher.channel.claim() == 1
    assert begun.wait(60)
    store = batcher.store
    batcher.engine.began_at -= AHEAD_S + 30
    batcher.tick()
    assert store.client.llen("realtime") == 0
    assert len(batcher.held()) == 2
    record = store.client.hget(store.inflight, "running") or b""
    assert len(record.split()) == 2
    model.watch = lambda: None
    waiting: list[int] = []
    ended = batcher.engine.next_done

    def next_done() -> Any:
        waiting.append(store.client.llen("realtime"))
        go_on.set()
        return ended()

    batcher.engine.next_done = next_done  # type: ignore[method-assign]
    batcher.drain(1.0)
    slow.set()
    assert (waiting, client.status(first).state) == ([0], "completed")
    assert store.client.llen("realtime") == 1
    (again,) = store.claim(1)
    assert (decode(again.payload).id, decode(again.payload).deaths) == (later, 0)
