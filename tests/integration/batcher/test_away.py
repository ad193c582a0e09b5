# SPDX-License-Identifier: Apache-2.0
"""The batcher while Redis is away, and after a reaper took its worker for dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.errors import GpuinferError
from gpuinfer.queue import keys
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.pace import LONG_BATCH_S
from tests.batchers import AHEAD_S, turn
from tests.claims import LONG_S, consuming, stand, unhurried
from tests.services import RedisServer
from tests.unit.test_engine import Small
from tests.workers import wait_until

pytestmark = pytest.mark.integration


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


def test_a_batch_that_ends_while_redis_is_away_is_not_put_back(
    batcher: Batcher, client: Client, model: Small, redis_server: RedisServer, settings: Settings
) -> None:
    """The first thing after the reconnection is its end, with a look for what is more urgent."""
    begun = threading.Event()
    model.watch = lambda: begun.wait(60)
    tasks = client.submit_many([[float(n)] for n in range(192)], model="picky", queue="default")
    with consuming(redis_server.socket, batcher, settings) as channel:
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
    batcher: Batcher, client: Client, redis_server: RedisServer, settings: Settings
) -> None:
    """The connection breaks with a claim's answer unread, and the worker is stopped before it looks again."""
    with consuming(redis_server.socket, batcher, settings) as channel:
        batcher.attach(channel, None)
        channel.brpop_timeout = LONG_S
        stand(channel)
        client.submit([1.0], model="picky", queue="realtime")
        wait_until(lambda: batcher.store.client.exists(batcher.store.inflight))
        channel.client.connection.disconnect()
        batcher.drain(1.0)
        assert not batcher.store.client.exists(batcher.store.inflight)
        assert batcher.store.client.llen("realtime") == 1


def test_a_worker_that_was_taken_for_dead_goes_on(
    batcher: Batcher,
    client: Client,
    model: Small,
    lost: list[GpuinferError],
    redis_server: RedisServer,
    settings: Settings,
) -> None:
    """What a reaper has put back is dropped, run again and ends once; the worker takes new tasks."""
    tasks = client.submit_many([[float(number)] for number in range(100)], model="picky")
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    with consuming(redis_server.socket, batcher, settings) as channel:
        channel.claim()
        assert batcher.held()
        store = batcher.store
        reaper = Store(store.client, store.worker, QUEUES, store._settings, by="reaper of x")
        assert reaper.restore().returned == 64
        batcher._pace.usual_s["picky"] = 0.001
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
    batcher: Batcher,
    client: Client,
    model: Small,
    redis_server: RedisServer,
    runs_s: float,
    settings: Settings,
) -> None:
    """It has taken the name over, and put nothing back: a job between two slices is claimed again, as what it
    holds here may be another's by now, and does not stay in flight. After a long batch the next claim comes
    before the ends are written."""
    job = client.submit_batch([[float(number)] for number in range(100)], model="picky")
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    with consuming(redis_server.socket, batcher, settings) as channel:
        channel.claim()
        assert batcher.engine.current is not None
        store = batcher.store
        reaper = Store(store.client, store.worker, QUEUES, store._settings, by="reaper of x")
        reaper._begin_epoch()
        batcher._pace.usual_s["picky"] = 0.001
        batcher.engine.began_at = time.monotonic() + AHEAD_S
        channel.claim()
        time.sleep(runs_s)
        go_on.set()
        turn(batcher, lambda: client.status(job).final, 60)
        assert len(client.result(job)) == 100
        turn(batcher, lambda: not store.client.exists(store.inflight))
