# SPDX-License-Identifier: Apache-2.0
"""Two workers of one name: on two hosts, in two containers, and one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gpuinfer import Client
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.heartbeats import FRESH_S, wait_for_namesake
from gpuinfer.queue.orphans import holder
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import Engine
from gpuinfer.worker.heartbeat import Pulse
from gpuinfer.worker.sizes import Sizes
from tests.models_for_tests import sleeper
from tests.orphans import check, ends, gpuinfer, submit
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def workers(redis_server: RedisServer, tmp_path: Path) -> Iterator[Workers]:
    sleeper(tmp_path / "models" / "slow", 0.1, max_batch_size=4)
    made = Workers(redis_server, tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_two_hosts_of_one_name(workers: Workers, redis_server: RedisServer, client: Client) -> None:
    """The second says so and ends with 73; its host's restore changes nothing; the first goes on."""
    first = workers.start(worker_models="slow", worker_run_dir=workers.folder / "a")
    log = workers.folder / "first.log"
    (workers.folder / "worker0.log").rename(log)
    other: dict[str, Any] = {"worker_models": "slow", "worker_run_dir": workers.folder / "b"}
    second = workers.start(ready=False, **other)
    assert second.wait(90) == 73
    assert f"another host is called {NAME.partition('@')[2]}, too" in second.text()
    assert gpuinfer(workers, "restore", "0", **other)[0] == 73
    check(client, submit(client, 4))
    assert first.running
    assert '"taken_back"' not in log.read_text()
    assert ends(redis_server) == {"completed": 4}


def test_after_a_kill(
    workers: Workers, client: Client, redis_server: RedisServer, settings_for: Callable[..., Settings]
) -> None:
    """On the same host its next process does not wait: the lock says that the last one is dead."""
    first = workers.start(worker_models="slow")
    broker = connect(settings_for(redis_server).broker)
    wait_until(lambda: holder(broker, NAME).domain, 60)
    first.kill()
    domain = (workers.folder / "run" / "domain").read_text().strip()
    assert holder(broker, NAME).domain == domain
    wait_for_namesake(broker, NAME, domain, pause=lambda _: pytest.fail("it waited"))
    workers.start(worker_models="slow")
    check(client, submit(client, 2))


def test_after_another_container(
    workers: Workers, client: Client, redis_server: RedisServer, settings_for: Callable[..., Settings]
) -> None:
    """Elsewhere nobody can tell that the last one is dead: its heartbeat grows old first."""
    first = workers.start(worker_models="slow", worker_run_dir=workers.folder / "a")
    broker = connect(settings_for(redis_server).broker)
    wait_until(lambda: holder(broker, NAME).domain, 60)
    first.kill()
    last = holder(broker, NAME)
    workers.start(worker_models="slow", worker_run_dir=workers.folder / "b")
    check(client, submit(client, 2))
    wait_until(lambda: holder(broker, NAME).domain != last.domain, 60)
    assert holder(broker, NAME).seen_at - last.seen_at > FRESH_S


def test_one_that_waits_changes_nothing(
    redis_server: RedisServer, settings_for: Callable[..., Settings]
) -> None:
    """Stopped while it waits for its namesake, or after Redis was away: heartbeat and record stay."""
    settings = settings_for(redis_server)
    broker = connect(settings.broker, retries=0)
    first = Store(broker, NAME, QUEUES, settings.queue, models=("slow",))
    first.restore()
    first.register(orjson.dumps({"domain": "first"}))
    broker.hset(first.inflight, "running", "1")
    epoch = broker.hgetall(keys.epoch(NAME))
    store = Store(broker, NAME, QUEUES, settings.queue, models=("slow",))
    deadline = Deadline(lambda: None)
    engine = Engine({}, Sizes({"slow": 4}), deadline, lambda: None)
    nothing: dict[str, Any] = {"slow": None}  # is never asked
    second = Batcher(store, engine, nothing, settings, "cpu", CeleryState(NAME), lambda error: None)
    pulse = Pulse(second, NAME, 0, domain="second", clock=lambda: 1e6)
    second.detach()
    pulse.lost()
    pulse.found()
    pulse.beat()
    pulse.stopping()
    second.drain(1.0)
    pulse.gone()
    deadline.close()
    assert holder(broker, NAME).domain == "first"
    assert broker.hget(first.inflight, "running") == b"1"
    assert broker.hgetall(keys.epoch(NAME)) == epoch
