# SPDX-License-Identifier: Apache-2.0
"""The batcher on a real Redis with a real model: retries, outages, a lost device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.errors import (
    DeviceError,
    DeviceOutOfMemory,
    GpuinferError,
    InferenceError,
    SoftTimeLimitExceeded,
)
from gpuinfer.models.loader import load
from gpuinfer.models.repository import Repository
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import PREDICT, decode
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.worker import batcher as batcher_module
from gpuinfer.worker import engine as engine_module
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import PROBE_EVERY_S, STALLED_AFTER_S, Engine
from gpuinfer.worker.pace import LONG_BATCH_S
from gpuinfer.worker.sizes import Sizes
from tests.claims import LONG_S, consuming, stand, unhurried
from tests.models_for_tests import picky
from tests.services import RedisServer
from tests.unit.test_engine import Small
from tests.workers import wait_until

pytestmark = pytest.mark.integration

#: What has just begun or moved does so as late as this: it stays just now while the machine stands still.
AHEAD_S = 600.0


class Line:
    """The channel's part: hands over what is claimed."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def claim(self, *, look: bool = True) -> int:
        state = self._batcher.state
        tasks = self._batcher.store.claim(
            self._batcher.wants(), state=state, begin=state == "idle", look=look
        )
        if tasks:
            self._batcher.receive(self, tasks)  # type: ignore[arg-type]  # all of a channel that is used
        return len(tasks)

    again = claim
    silent = True

    def withdraw(self) -> None:
        """No claim is on its way."""


@pytest.fixture
def model(tmp_path: Path) -> Small:
    picky(tmp_path / "picky")
    return Small(load(Repository([tmp_path]).get("picky"), "cpu"), device="cuda:0")


@pytest.fixture
def lost() -> list[GpuinferError]:
    return []


@pytest.fixture
def batcher(
    redis_server: RedisServer,
    settings_for: Callable[..., Settings],
    model: Small,
    lost: list[GpuinferError],
) -> Iterator[Batcher]:
    settings = settings_for(redis_server, queue={"retry_backoff_s": 0.05, "max_retries": 2})
    client = connect(settings.broker, retries=0)
    store = Store(client, "gpu0@here", QUEUES, settings.queue, models=("picky",))
    store.register(default="picky")
    deadline = Deadline(lambda: None)
    engine = Engine({"picky": model}, Sizes({"picky": 64}), deadline, lambda: None)  # type: ignore[dict-item]
    made = Batcher(
        store, engine, {"picky": model.manifest}, settings, "cpu", CeleryState("gpu0@here"), lost.append
    )
    made.channel = Line(made)  # type: ignore[assignment]  # all of a channel that is used
    yield made
    engine.close()
    deadline.close()


def turn(batcher: Batcher, until: Callable[[], object], timeout: float = 60.0) -> None:
    """Do what the event loop does, until the condition holds."""
    end = time.monotonic() + timeout
    while not until():
        assert time.monotonic() < end
        assert batcher.channel is not None
        batcher.channel.claim()
        batcher.tick()
        time.sleep(0.005)


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
    batcher: Batcher, client: Client, model: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that waits for its next try goes back to its list, and the log says so."""
    model.fits = 0
    task = client.submit([1.0], model="picky")
    batcher._settings = batcher._settings.model_copy(
        update={"queue": batcher._settings.queue.model_copy(update={"retry_backoff_s": 600.0})}
    )
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


def test_results_wait_for_redis(
    batcher: Batcher, client: Client, redis_server: RedisServer, model: Small
) -> None:
    """A batch that ends while Redis is away is settled when it is back."""
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    task = client.submit([1.0], model="picky")
    assert batcher.channel is not None
    batcher.channel.claim()
    redis_server.client().save()
    go_on.set()
    while batcher.engine.done.empty():
        time.sleep(0.005)
    redis_server.stop()
    batcher.channel = None
    batcher.tick()
    batcher.tick()
    redis_server.start()
    batcher.tick()
    assert client.status(task).state == "completed"


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

    monkeypatch.setattr(batcher_module, "conclude", broken)
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


def test_a_batch_that_ends_while_redis_is_away_is_not_put_back(
    batcher: Batcher, client: Client, model: Small, redis_server: RedisServer
) -> None:
    """The first thing after the reconnection is its end, with a look for what is more urgent."""
    begun = threading.Event()
    model.watch = lambda: begun.wait(60)
    tasks = client.submit_many([[float(n)] for n in range(192)], model="picky", queue="default")
    with consuming(redis_server.socket, batcher, batcher._settings) as channel:
        channel.claim()
        assert batcher.engine.current is not None
        running = {held.id for held in batcher.engine.current.tasks}
        assert 0 < len(running) < len(tasks)
        assert not batcher.wants(), "how long a first batch takes nobody knows"
        batcher.detach()
        time.sleep(2 * LONG_BATCH_S)
        begun.set()
        wait_until(lambda: not batcher.engine.done.empty())
        batcher.store.mark_uncertain()
        batcher.attach(channel, None)
        with capture_logs() as lines:
            batcher.collect()
        assert "task_skipped" not in {line["event"] for line in lines}
        assert all(client.status(task).final for task in running)
        turn(batcher, lambda: all(client.status(task).final for task in tasks))
    assert sum(model.sizes) == len(tasks)


@pytest.fixture
def _unhurried() -> Iterator[None]:
    with unhurried():
        yield


@pytest.mark.usefixtures("_unhurried")
def test_an_end_in_doubt_leaves_nothing_in_flight(
    batcher: Batcher, client: Client, redis_server: RedisServer
) -> None:
    """The connection breaks with a claim's answer unread, and the worker is stopped before it looks again."""
    with consuming(redis_server.socket, batcher, batcher._settings) as channel:
        batcher.attach(channel, None)
        channel.brpop_timeout = LONG_S
        stand(channel)
        client.submit([1.0], model="picky", queue="realtime")
        wait_until(lambda: batcher.store.client.exists(batcher.store.inflight))
        channel.client.connection.disconnect()
        batcher.drain(1.0)
        assert not batcher.store.client.exists(batcher.store.inflight)
        assert batcher.store.client.llen("realtime") == 1


def test_nothing_is_claimed_behind_a_long_batch(batcher: Batcher, client: Client, model: Small) -> None:
    """Another worker may be idle before it ends. Behind one that is known to be short, the next is held."""
    go_on = threading.Event()
    assert batcher.channel is not None
    client.submit([1.0], model="picky")
    turn(batcher, lambda: len(model.sizes) == 1 and batcher.engine.current is None)
    for seconds, claimed in ((0.001, 1), (2 * LONG_BATCH_S, 0)):
        batcher._batch_s["picky"] = seconds
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
    batcher._routed_at -= batcher_module.ROUTE_EVERY_S
    batcher.tick()
    assert (raw.llen("realtime"), raw.llen("realtime.picky")) == (0, 1)
    go_on.set()
    turn(batcher, lambda: sum(model.sizes) == 2)


def test_a_worker_that_was_taken_for_dead_goes_on(
    batcher: Batcher, client: Client, model: Small, lost: list[GpuinferError], redis_server: RedisServer
) -> None:
    """What a reaper has put back is dropped, run again and ends once; the worker takes new tasks."""
    tasks = client.submit_many([[float(number)] for number in range(100)], model="picky")
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    with consuming(redis_server.socket, batcher, batcher._settings) as channel:
        channel.claim()
        assert batcher.held()
        store = batcher.store
        reaper = Store(store.client, store.worker, QUEUES, store._settings, by="reaper of x")
        assert reaper.restore().returned == 64
        batcher._batch_s["picky"] = 0.001
        batcher.engine.began_at = time.monotonic() + AHEAD_S
        channel.claim()
        assert not lost
        go_on.set()
        turn(batcher, lambda: all(client.status(task).final for task in tasks))
        assert not store.client.exists(store.inflight)
    ended = store.client.hget(keys.ENDED, "completed realtime picky")
    assert ended == b"100"


@pytest.mark.parametrize("runs_s", [0.0, 2 * LONG_BATCH_S])
def test_a_reaper_that_is_cut_off_leaves_no_task_behind(
    batcher: Batcher, client: Client, model: Small, redis_server: RedisServer, runs_s: float
) -> None:
    """It has taken the name over, and put nothing back: a job between two slices is claimed again, as what it
    holds here may be another's by now, and does not stay in flight. After a long batch the next claim comes
    before the ends are written."""
    job = client.submit_batch([[float(number)] for number in range(100)], model="picky")
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    with consuming(redis_server.socket, batcher, batcher._settings) as channel:
        channel.claim()
        assert batcher.engine.current is not None
        store = batcher.store
        reaper = Store(store.client, store.worker, QUEUES, store._settings, by="reaper of x")
        reaper._begin_epoch()
        batcher._batch_s["picky"] = 0.001
        batcher.engine.began_at = time.monotonic() + AHEAD_S
        channel.claim()
        time.sleep(runs_s)
        go_on.set()
        turn(batcher, lambda: client.status(job).final, 60)
        assert len(client.result(job)) == 100
        turn(batcher, lambda: not store.client.exists(store.inflight))


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
    batcher._batch_s["picky"] = 0.001
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
