# SPDX-License-Identifier: Apache-2.0
"""Signs of life of a real worker and a real API: to systemd, whose socket the test makes, and in Redis."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis

from gpuinfer import Client, __version__
from gpuinfer.queue import heartbeats, keys
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, QueueSettings
from tests.apis import Api
from tests.conftest import RedisFactory
from tests.integration.conftest import Systemd
from tests.models_for_tests import latched
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


def heartbeat(client: redis.Redis) -> dict[str, Any]:
    """Return worker 0's, empty when it has none."""
    return heartbeats.fresh(client, [NAME]).get(NAME, {})


def test_a_workers_life(
    systemd: Systemd, workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """Loading, ready, busy, draining, gone: in this order, to systemd and in Redis."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=1)
    raw = redis_server.client()
    worker = workers.start(worker_models="slow")
    assert systemd.until("READY") == "READY=1"
    # More time is asked for again where loading takes more than ten seconds.
    told = list(dict.fromkeys(systemd.notes))
    assert told == ["STATUS=loading slow", "EXTEND_TIMEOUT_USEC=30000000", "READY=1"]
    assert systemd.until("WATCHDOG_USEC") == "WATCHDOG_USEC=50000000", "a deaf Redis is no hang"
    assert systemd.until("STATUS") == "STATUS=slow on cpu: 0 done, 0/s, 0 waiting"
    beat = heartbeat(raw)
    assert beat.pop("pid") == worker.pid
    at, since = float(beat.pop("at")), float(beat.pop("since"))
    assert since <= at <= time.time()
    assert beat.pop("domain")
    assert beat.pop("memory_bytes") > 50 * 2**20
    assert beat.pop("load_s") > 0
    versions = beat.pop("versions")
    assert list(versions) == ["slow"] and versions["slow"].startswith("sha256:")
    assert beat == {
        "worker": NAME,
        "host": socket.gethostname(),
        "gpu": 0,
        "state": "idle",
        "device": "cpu",
        "models": ["slow"],
        "missing": {},
        "queues": ["realtime", "default", "batch"],
        "done": 0,
        "rate": 0.0,
        "running": 0,
        "busy": 0.0,
        "version": __version__,
    }
    assert raw.ttl(keys.heartbeat(NAME)) == -1, "a full Redis would drop it first of all"
    ids = client.submit_many([[1.0]] * 3, model="slow")
    wait_until(lambda: heartbeat(raw).get("state") == "busy")
    assert heartbeat(raw)["running"] == 1
    systemd.until("WATCHDOG=1")
    worker.send(signal.SIGTERM)
    assert systemd.until("STOPPING") == "STOPPING=1"
    assert systemd.until("STATUS") == "STATUS=slow on cpu: finishing a batch of 1"
    assert systemd.until("EXTEND") == f"EXTEND_TIMEOUT_USEC={(900 + 45) * 1_000_000}"
    wait_until(lambda: heartbeat(raw).get("state") == "draining")
    latch.open()
    assert worker.wait() == 0
    assert not raw.exists(keys.heartbeat(NAME))
    assert client.status(ids[0]).state == "completed"
    assert systemd.notes.count("READY=1") == 1


def test_full_redis(redis_factory: RedisFactory, tmp_path: Path) -> None:
    """The heartbeat is written also when Redis takes no new work."""
    server = redis_factory(maxmemory="8mb", maxmemory_policy="volatile-ttl")
    raw = server.client()
    with pytest.raises(redis.OutOfMemoryError):
        while True:
            raw.lpush("filler", b"x" * 10_000)
    workers = Workers(server, tmp_path)
    try:
        worker = workers.start()
        assert heartbeat(raw)["state"] == "idle"
        raw.delete(keys.heartbeat(NAME))
        wait_until(lambda: heartbeat(raw))
        with pytest.raises(redis.OutOfMemoryError):
            raw.set("more", 1)
        assert worker.terminate() == 0
        assert not heartbeat(raw)
    finally:
        workers.close()


def test_start_without_redis(systemd: Systemd, workers: Workers, redis_server: RedisServer) -> None:
    """A worker that starts while Redis is away is up, says so, is fed, serves later, and stops with 0."""
    redis_server.stop()
    worker = workers.start(ready=False)
    assert systemd.until("READY") == "READY=1"
    assert systemd.until("STATUS") == "STATUS=digits on cpu: waiting for Redis"
    for _ in range(3):
        systemd.until("WATCHDOG=1")
    redis_server.start()
    assert systemd.until("STATUS=digits on cpu: 0 done")
    redis_server.stop()
    assert systemd.until("STATUS") == "STATUS=digits on cpu: waiting for Redis"
    assert worker.terminate() == 0
    assert systemd.notes.count("READY=1") == 1


def test_stop_without_redis(systemd: Systemd, workers: Workers, redis_server: RedisServer) -> None:
    """A SIGTERM ends a worker that has never seen Redis, in order and with 0."""
    redis_server.stop()
    worker = workers.start(ready=False)
    systemd.until("STATUS=digits on cpu: waiting for Redis")
    assert worker.terminate() == 0
    assert systemd.until("STOPPING") == "STOPPING=1"
    assert "Traceback" not in worker.text()


def test_api(systemd: Systemd, redis_server: RedisServer, tmp_path: Path) -> None:
    """The API says where it listens, feeds the watchdog from its event loop, and says that it stops."""
    with Api(redis_server, tmp_path) as api:
        assert systemd.until("READY") == "READY=1"
        assert systemd.until("STATUS") == f"STATUS=listening on {api.address}"
        for _ in range(3):
            systemd.until("WATCHDOG=1")
        assert api.process.terminate() == 0
    assert systemd.until("STOPPING") == "STOPPING=1"


def test_only_fresh_ones_count(redis_server: RedisServer) -> None:
    """A heartbeat is one for ten seconds, by Redis's clock; what never beat has none."""
    with redis_server.client() as raw:
        for worker, state in (("gpu0@a", "idle"), ("gpu1@a", "busy")):
            Store(raw, worker, QUEUES, QueueSettings()).register(orjson.dumps({"state": state}))
        seconds = raw.time()[0]
        raw.set(keys.heartbeat("gpu2@a"), f'{{"at": {seconds - heartbeats.FRESH_S - 1}}}')
        raw.set(keys.heartbeat("gpu3@a"), "{}")
        raw.set(keys.heartbeat("gpu4@a"), "what no worker has written")
        found = heartbeats.fresh(raw, [f"gpu{number}@a" for number in range(6)])
        assert {name: body["state"] for name, body in found.items()} == {"gpu0@a": "idle", "gpu1@a": "busy"}
        assert heartbeats.fresh(raw, []) == {}
