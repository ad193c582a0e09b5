# SPDX-License-Identifier: Apache-2.0
"""Who is served when, and by whom: priorities, urgent work, ageing, and what workers leave to each other."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys
from tests.models_for_tests import sleeper
from tests.services import Process, RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


def begun(worker: Process) -> list[list[str]]:
    """Return the tasks of each batch that has begun, in order."""
    lines = [line for line in worker.lines() if '"batch_begun"' in line]
    return [json.loads(line)["task_ids"] for line in lines]


def batches_before(urgent: str, worker: Process, client: Client) -> int:
    """Wait for a task just submitted, and return how many batches began between its acknowledgement and it.

    One may: it was claimed before.
    """
    running = len(begun(worker))
    client.result(urgent, timeout_s=60)
    return next(n for n, ids in enumerate(begun(worker)) if urgent in ids) - running


def test_order_of_serving(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Queues go before priorities, 9 before 0, and equals in the order they came."""
    sleeper(workers.folder / "models" / "slow", 0.01, max_batch_size=1)
    wanted = []
    for queue, priority in (("batch", 9), ("default", 0), ("realtime", 0), ("realtime", 9), ("realtime", 9)):
        wanted.append(client.submit([1.0], model="slow", queue=queue, priority=priority))  # type: ignore[arg-type]
    workers.start(worker_models="slow")
    order = [status.id for status in client.as_completed(wanted, timeout_s=10)]
    assert order == [wanted[3], wanted[4], wanted[2], wanted[1], wanted[0]]


def test_urgent_waits_for_one_batch_at_most(workers: Workers, client: Client) -> None:
    """An urgent task that comes while low ones run and wait is served right after the running batch."""
    sleeper(workers.folder / "models" / "slow", 0.3, max_batch_size=4)
    low = client.submit_many([[1.0]] * 40, model="slow", queue="batch")
    worker = workers.start(worker_models="slow", log_level="debug")
    wait_until(lambda: client.status(low[0]).state == "running")
    urgent = client.submit([1.0], model="slow", queue="realtime", priority=9)
    assert batches_before(urgent, worker, client) <= 1
    assert client.status(low[-1]).state == "queued"


def test_urgent_from_a_plain_producer(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """An urgent task of a producer that tells nobody is found while long batches run one after another."""
    sleeper(workers.folder / "models" / "slow", 0.1, max_batch_size=1)
    low = client.submit_many([[1.0]] * 100, model="slow")
    workers.start(worker_models="slow")
    wait_until(lambda: client.status(low[0]).final)
    url = f"redis+socket://{redis_server.socket}"
    with Celery("stranger", broker=url, backend=url, set_as_current=False) as stranger:
        kwargs = {"model": "slow"}
        urgent = stranger.send_task("gpuinfer.predict", [[1.0]], kwargs, queue="realtime", priority=9)
        urgent.get(timeout=30)
    assert client.status(low[-1]).state == "queued"


def test_urgent_between_slices(workers: Workers, client: Client) -> None:
    """A list job that does not fit is run in slices, and an urgent task gets in between them."""
    sleeper(workers.folder / "models" / "slow", 0.2, max_batch_size=2)
    workers.start(worker_models="slow")
    job = client.submit_batch([[1.0]] * 20, model="slow")
    wait_until(lambda: client.status(job).state == "running")
    client.result(client.submit([1.0], model="slow"), timeout_s=5)
    assert client.status(job).state == "running"
    answers = client.result(job, timeout_s=10)
    assert len(answers) == 20
    assert answers[0]["outputs"]["twice"] == [2.0]


def test_workers_share_list_jobs(workers: Workers, client: Client) -> None:
    """A worker takes no more list jobs than it can run next: another one has the others."""
    sleeper(workers.folder / "models" / "slow", 0.1, max_batch_size=2)
    for number in (0, 1):
        workers.start(number, worker_models="slow")
    jobs = [client.submit_batch([[1.0]] * 10, model="slow") for _ in range(8)]
    by = Counter(status.worker for status in client.as_completed(jobs, timeout_s=20))
    assert len(by) == 2
    assert min(by.values()) >= 2


def test_workers_share_what_comes_one_by_one(workers: Workers, client: Client) -> None:
    """Of models with very different batches, what waits for the small batches lies with nobody."""
    sleeper(workers.folder / "models" / "one", 0.1, max_batch_size=1)
    sleeper(workers.folder / "models" / "many", 0.1, max_batch_size=64)
    for number in (0, 1):
        workers.start(number, worker_models="one,many")
    tasks = client.submit_many([[1.0]] * 30, model="one")
    by = Counter(status.worker for status in client.as_completed(tasks, timeout_s=20))
    assert len(by) == 2
    assert min(by.values()) >= 8
    assert not any(status.redelivered for status in client.as_completed(tasks, timeout_s=1))


def test_urgent_before_aged_jobs(workers: Workers, client: Client) -> None:
    """A list job that has aged goes first once; an urgent task waits for that one batch, not for the job."""
    sleeper(workers.folder / "models" / "slow", 0.2, max_batch_size=1)
    jobs = [client.submit_batch([[1.0]] * 30, model="slow") for _ in range(2)]
    filler = client.submit_many([[1.0]] * 12, model="slow")
    worker = workers.start(worker_models="slow", queue_ageing_s=0.5, log_level="debug")
    wait_until(lambda: any(client.status(job).state == "running" for job in jobs))
    urgent = client.submit([1.0], model="slow", priority=9)
    assert batches_before(urgent, worker, client) <= 1
    assert filler
    assert not any(client.status(job).final for job in jobs)


def test_large_jobs_leave_room_for_urgent_ones(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """However large what waits is, a worker holds few bytes of it, and urgent work overtakes it."""
    sleeper(workers.folder / "models" / "slow", 0.3, max_batch_size=256)
    large = [{"b64": "A" * 2_000_000, "dtype": "float32", "shape": [1]}]
    jobs = [client.submit_batch([[1.0], *large], model="slow") for _ in range(150)]
    worker = workers.start(worker_models="slow", log_level="debug")
    wait_until(lambda: any(client.status(job).final for job in jobs), 60)
    assert redis_server.client().hlen(keys.inflight(NAME)) / 2 < 75  # 33 that run, and 33 that are next
    urgent = client.submit([1.0], model="slow", priority=9)
    assert batches_before(urgent, worker, client) <= 1
    client.results(jobs, timeout_s=120)
    assert urgent not in begun(worker)[-1], "all had begun before it was submitted"


def test_a_flood_of_later_tasks(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Tasks that wait for their time are in nobody's way."""
    app = Celery("stranger", broker=f"redis+socket://{redis_server.socket}", set_as_current=False)
    images, _ = load_test_images()
    for _ in range(600):
        app.send_task("gpuinfer.predict", [images[0].tolist()], queue="realtime", countdown=600)
    workers.start()
    wait_until(lambda: not redis_server.client().llen("realtime"))
    assert client.result(client.submit(images[0].tolist(), queue="batch"), timeout_s=5)


def test_ageing(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """With ageing a starved queue gets a turn while urgent work goes on; without, it does not."""
    sleeper(workers.folder / "models" / "slow", 0.05, max_batch_size=1)
    for ageing_s, served in ((0.5, True), (0, False)):
        low = client.submit([1.0], model="slow", queue="batch")
        urgent = client.submit_many([[1.0]] * 40, model="slow", queue="realtime", priority=9)
        worker = workers.start(worker_models="slow", queue_ageing_s=ageing_s)
        client.result(urgent[30], timeout_s=10)
        assert (client.status(low).state == "completed") is served
        client.results([*urgent, low], timeout_s=10)
        worker.terminate()
