# SPDX-License-Identifier: Apache-2.0
"""Redis restarted, killed, stopped, refusing, full: everybody waits, nothing is lost, one line per change."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from gpuinfer import Client
from gpuinfer.errors import QueueFull
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys, results
from gpuinfer.settings import Settings
from tests.conftest import RedisFactory
from tests.models_for_tests import latched
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.faults

IMAGE = load_test_images()[0][0].tolist()


@pytest.fixture
def redis_server(redis_factory: RedisFactory) -> RedisServer:
    """A Redis that keeps every write, so that what is lost is lost by us."""
    return redis_factory(appendonly="yes", appendfsync="always")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_restart_under_a_running_batch(
    workers: Workers, client: Client, redis_server: RedisServer, how: str
) -> None:
    """Redis goes while a batch runs and comes back after its end: all answers come, nothing runs twice."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=2)
    worker = workers.start(worker_models="slow")
    tasks = client.submit_many([[1.0]] * 6, model="slow")
    wait_until(lambda: client.status(tasks[0]).state == "running")
    getattr(redis_server, how)()
    worker.wait_for_line('"redis_away"')
    latch.open()
    time.sleep(2)  # the batch ends, and Redis is tried more than once
    redis_server.start()
    statuses = list(client.as_completed(tasks, timeout_s=60))
    assert {status.state for status in statuses} == {"completed"}
    assert not any(status.redelivered for status in statuses)
    assert worker.running
    assert not redis_server.client().exists(keys.inflight(NAME))
    text = worker.text()
    assert text.count('"redis_away"') == 1
    assert text.count('"redis_back"') == 1


def test_stopped_for_a_while(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """A Redis that is deaf for 30 s (SIGSTOP) is waited for; work goes on by itself when it is back."""
    worker = workers.start(broker_connect_timeout_s=2)
    client.result(client.submit(IMAGE), timeout_s=60)
    redis_server.process.send(signal.SIGSTOP)
    time.sleep(30)
    redis_server.process.send(signal.SIGCONT)
    answers = client.results(client.submit_many([IMAGE] * 50), timeout_s=60)
    assert len(answers) == 50
    assert worker.running


def test_many_restarts_under_load(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Redis is killed again and again while 3,000 tasks drain: each ends once, none is lost."""
    workers.start()
    tasks = client.submit_many([IMAGE] * 3000)
    for _ in range(5):
        time.sleep(0.3)
        redis_server.kill()
        redis_server.start()
    statuses = list(client.as_completed(tasks, timeout_s=120))
    assert {status.id for status in statuses} == set(tasks)
    assert {status.state for status in statuses} == {"completed"}
    wait_until(lambda: not redis_server.client().exists(keys.inflight(NAME)))


def test_idle_outage_is_quiet(workers: Workers, redis_server: RedisServer) -> None:
    """Redis away for 5 s: no busy loop (under a tenth of a core), two lines in the log."""
    worker = workers.start()
    redis_server.kill()
    time.sleep(1)
    before, began = _cpu_s(worker.pid), time.monotonic()
    time.sleep(4)
    used, passed = _cpu_s(worker.pid) - before, time.monotonic() - began
    redis_server.start()
    worker.wait_for_line('"redis_back"')
    assert used < passed / 10
    assert len([line for line in worker.text().splitlines() if "redis" in line.lower()]) <= 3


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_full_redis(
    workers: Workers, redis_factory: RedisFactory, settings_for: Callable[..., Settings]
) -> None:
    """A full Redis refuses new work clearly; a worker, even one that starts then, finishes what it took."""
    server = redis_factory(maxmemory="12mb", maxmemory_policy="volatile-ttl")
    small = Workers(server, workers.folder)
    unbounded = settings_for(server, queue={"max_waiting_bytes": 2**30})  # else it is refused before that
    with Client(unbounded) as mine:
        accepted: list[str] = []
        with pytest.raises(QueueFull):
            while True:
                accepted.append(mine.submit(IMAGE, queue="batch"))
        with pytest.raises(redis.OutOfMemoryError):
            server.client().lpush("filler", b"x" * 1000)
        try:
            worker = small.start(queue_result_ttl_s=600)
            raw = server.client()
            wait_until(lambda: not raw.llen("batch"), 60)
            wait_until(lambda: not raw.exists(keys.inflight(NAME)))
            assert worker.running
            assert mine.result(mine.submit(IMAGE), timeout_s=60)
        finally:
            small.close()
        left = [results.parse(task, meta) for task in accepted if (meta := raw.get(keys.result(task)))]
        assert {status.state for status in left} == {"completed"}
        assert len(left) + int(raw.info("stats")["evicted_keys"]) >= len(accepted)


def test_sigterm_while_redis_is_away(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """A worker stopped without Redis finishes its batch, and counts no death against what it held."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=2)
    tasks = client.submit_many([[1.0]] * 4, model="slow")
    worker = workers.start(worker_models="slow")
    wait_until(lambda: client.status(tasks[0]).state == "running")
    redis_server.kill()
    worker.wait_for_line('"redis_away"')
    worker.send(signal.SIGTERM)
    worker.wait_for_line('"stopping"')
    latch.open()
    worker.wait_for_line('"batch_done"')
    redis_server.start()
    assert worker.wait() == 0
    assert not redis_server.client().exists(keys.inflight(NAME))
    workers.start(worker_models="slow")
    statuses = list(client.as_completed(tasks, timeout_s=60))
    assert {status.state for status in statuses} == {"completed"}
    assert sum(status.redelivered for status in statuses) <= 2
    assert redis_server.client().hlen(keys.DEAD) == 0


@pytest.mark.parametrize("how", ["replica", "disk"])
def test_redis_that_takes_no_writes(
    workers: Workers, client: Client, redis_server: RedisServer, how: str
) -> None:
    """A Redis that turns into a replica, or cannot write to its disk, is waited for; the worker stays."""
    worker = workers.start()
    client.result(client.submit(IMAGE), timeout_s=60)
    raw = redis_server.client()
    if how == "replica":
        raw.replicaof("127.0.0.1", 1)
    else:
        raw.config_set("stop-writes-on-bgsave-error", "yes")
        raw.config_set("save", "1 1")
        (redis_server.folder / "dump.rdb").mkdir()  # cannot be written over
        with pytest.raises(redis.ResponseError, match="MISCONF"):
            while True:
                raw.set("filler", 1)
                time.sleep(0.1)
    time.sleep(5)
    assert worker.running
    if how == "replica":
        raw.replicaof("NO", "ONE")
    else:
        (redis_server.folder / "dump.rdb").rmdir()
        raw.config_set("save", "")
        raw.config_set("stop-writes-on-bgsave-error", "no")
    assert client.result(client.submit(IMAGE), timeout_s=60)
    lines = [line for line in worker.text().splitlines() if '"error"' in line or '"critical"' in line]
    assert len(lines) <= 2, lines
