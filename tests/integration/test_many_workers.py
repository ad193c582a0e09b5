# SPDX-License-Identifier: Apache-2.0
"""Several real workers: tasks find the ones that serve them, and nothing waits while one of them is idle."""

from __future__ import annotations

import socket
import time
from collections import Counter
from typing import Any

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.queue import keys
from tests.models_for_tests import add_scalar, latched, picky, sleeper
from tests.services import RedisServer
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.integration


def idle(server: RedisServer) -> set[str]:
    """Return the workers that stand in the idle sets and were not woken since."""
    raw: Any
    with server.client() as raw:
        seconds, _ = raw.time()
        found = [raw.zrangebyscore(name, seconds - 2, "+inf") for name in raw.keys(keys.IDLE_PREFIX + "*")]
    return {worker.decode() for workers in found for worker in workers}


def name(number: int) -> str:
    return f"gpu{number}@{socket.gethostname()}"


@pytest.mark.parametrize("stopped", [None, 0, 1])
def test_two_models_on_two_workers(
    workers: Workers, client: Client, redis_server: RedisServer, stopped: int | None
) -> None:
    """All tasks succeed, from our client and from a plain producer, who puts all in the default model's list;
    also while the default model's worker, or the other one, is stopped for a while."""
    add_scalar(workers.folder / "models" / "add")
    picky(workers.folder / "models" / "root")
    running = [workers.start(number, worker_models=model) for number, model in enumerate(("add", "root"))]
    wait_until(lambda: redis_server.client().get(keys.DEFAULT_MODEL), 60)
    values = {"add": {"x": [1, 2, 3, 4], "k": 1}, "root": [4.0]}
    if stopped is not None:
        assert running[stopped].terminate() == 0
    url = f"redis+socket://{redis_server.socket}"
    with Celery("stranger", broker=url, backend=url, set_as_current=False) as stranger:
        theirs = [
            stranger.send_task(
                "gpuinfer.predict", [values[model]], {"model": model}, queue="realtime", priority=number % 3
            )
            for number in range(40)
            for model in values
        ]
        ours = {model: client.submit_many([value] * 40, model=model) for model, value in values.items()}
        if stopped is not None:
            other = ("add", "root")[1 - stopped]
            client.results(ours[other], timeout_s=60)
            assert all(task.get(timeout=60)["model"] == other for task in theirs[1 - stopped :: 2])
            workers.start(stopped, worker_models=("add", "root")[stopped])
        for place, model in enumerate(values):
            assert all(task.get(timeout=60)["model"] == model for task in theirs[place::2])
            statuses = list(client.as_completed(ours[model], timeout_s=60))
            assert {status.state for status in statuses} == {"completed"}
            assert {status.worker for status in statuses} == {name(place)}
            assert not any(status.redelivered for status in statuses)


def test_a_burst_runs_on_all_of_them(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Shares within one of each other, all at the same time."""
    sleeper(workers.folder / "models" / "slow", 0.1, max_batch_size=16)
    for number in range(3):
        workers.start(number, worker_models="slow")

    def shares(count: int) -> list[int]:
        wait_until(lambda: len(idle(redis_server)) == 3, 60)
        tasks = client.submit_many([[1.0]] * count, model="slow")
        by = Counter(status.worker for status in client.as_completed(tasks, timeout_s=60))
        return sorted(by.values())

    for count, even in ((3, [1, 1, 1]), (7, [2, 2, 3]), (24, [8, 8, 8])):
        # Where the machine lets one of them stand still, the others rightly take its share.
        wait_until(lambda count=count, even=even: shares(count) == even)  # type: ignore[misc]


def test_nothing_waits_behind_a_long_batch(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """One worker runs for long, another is idle: what comes is the idle one's, one after the other."""
    sleeper(workers.folder / "models" / "slow", 0.1, max_batch_size=1)
    latch = latched(workers.folder / "models" / "slower", max_batch_size=1)
    for number in range(2):
        workers.start(number, worker_models="slow,slower")
    wait_until(lambda: len(idle(redis_server)) == 2, 60)
    long = client.submit([1.0], model="slower")
    wait_until(lambda: client.status(long).state == "running", 60)
    busy = client.status(long).worker
    for _ in range(10):
        task = client.submit([1.0], model="slow")
        client.result(task, timeout_s=60)
        assert client.status(task).worker not in (None, busy)
    tasks = client.submit_many([[1.0]] * 10, model="slow")
    with redis_server.client() as raw:
        while not client.status(tasks[-1]).final:
            assert raw.hlen(keys.inflight(str(busy))) in (2, 3), "the long one, and the record that it runs"
            time.sleep(0.01)
    assert client.status(long).state == "running"
    latch.open()
    client.result(long, timeout_s=60)


def test_an_idle_worker_that_is_killed(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """It stands in the idle set still, and is woken in vain: another one serves the task soon."""
    sleeper(workers.folder / "models" / "quick", 0.0, max_batch_size=4)
    running = {number: workers.start(number, worker_models="quick") for number in range(3)}
    took = []
    for victim in (0, 1):
        wait_until(lambda: len(idle(redis_server)) == len(running), 60)
        running.pop(victim).kill()
        begun = time.monotonic()
        tasks = [client.submit([1.0], model="quick") for _ in range(3)]
        statuses = list(client.as_completed(tasks, timeout_s=60))
        took.append(time.monotonic() - begun)
        assert {status.state for status in statuses} == {"completed"}
        assert name(victim) not in {status.worker for status in statuses}
    assert min(took) < 10, "within a second, both times, on a machine that has nothing else to do"
