# SPDX-License-Identifier: Apache-2.0
"""Who is served when, and by whom: priorities, urgent work, ageing, and what workers leave to each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys
from tests.models_for_tests import Gate, sleeper
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


#: The input of the urgent task.
URGENT = 9.0


def batches_before(urgent: Mapping[str, Any], gate: Gate, client: Client) -> int:
    """Submit a task while a batch is held; return how many batches begin between that one and its own.

    One may: it was claimed before.
    """
    begun = len(gate.batches)
    task = client.submit([URGENT], model="slow", **urgent)
    gate.open()
    client.result(task, timeout_s=60)
    return gate.first(URGENT) - begun


def test_order_of_serving(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Queues go before priorities, 9 before 0, and equals in the order they came."""
    sleeper(workers.folder / "models" / "slow", 0.01, max_batch_size=1)
    wanted = []
    for queue, priority in (("batch", 9), ("default", 0), ("realtime", 0), ("realtime", 9), ("realtime", 9)):
        wanted.append(client.submit([1.0], model="slow", queue=queue, priority=priority))  # type: ignore[arg-type]
    workers.start(worker_models="slow")
    order = [status.id for status in client.as_completed(wanted, timeout_s=60)]
    assert order == [wanted[3], wanted[4], wanted[2], wanted[1], wanted[0]]


def test_urgent_waits_for_one_batch_at_most(workers: Workers, client: Client) -> None:
    """An urgent task that comes while low ones run and wait is served right after the running batch."""
    gate = Gate(workers.folder / "models" / "slow", max_batch_size=4, shut=True)
    client.submit_many([[1.0]] * 40, model="slow", queue="batch")
    workers.start(worker_models="slow")
    wait_until(lambda: gate.held)
    assert batches_before({"queue": "realtime", "priority": 9}, gate, client) <= 1


def test_urgent_from_a_plain_producer(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """An urgent task of a producer that tells nobody is found while long batches run one after another."""
    gate = Gate(workers.folder / "models" / "slow", max_batch_size=1)
    client.submit_many([[1.0]] * 5, model="slow")
    client.submit_many([[3.0]] * 40, model="slow")
    last = client.submit([2.0], model="slow")
    gate.shut_at(3.0)
    workers.start(worker_models="slow")
    wait_until(lambda: gate.held)
    url = f"redis+socket://{redis_server.socket}"
    with Celery("stranger", broker=url, backend=url, set_as_current=False) as stranger:
        kwargs = {"model": "slow"}
        urgent = stranger.send_task("gpuinfer.predict", [[URGENT]], kwargs, queue="realtime", priority=9)
        gate.open()
        urgent.get(timeout=60)
    client.result(last, timeout_s=60)
    assert gate.first(URGENT) < gate.first(2.0)


def test_urgent_between_slices(workers: Workers, client: Client) -> None:
    """A list job that does not fit is run in slices, and an urgent task gets in between them."""
    gate = Gate(workers.folder / "models" / "slow", max_batch_size=2, shut=True)
    workers.start(worker_models="slow")
    job = client.submit_batch([[1.0]] * 20, model="slow")
    wait_until(lambda: gate.held)
    urgent = client.submit([URGENT], model="slow")
    gate.open()
    answers = client.result(job, timeout_s=60)
    assert [answer["output"] for answer in answers] == [[1.0]] * 20
    client.result(urgent, timeout_s=60)
    assert gate.first(URGENT) < gate.last(1.0)


def held_by(redis: RedisServer, number: int) -> int:
    """Return how many tasks worker ``number`` has claimed and not ended."""
    return int(redis.client().hlen(keys.inflight(NAME.replace("gpu0", f"gpu{number}"))) / 2)


def test_workers_share_list_jobs(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """A worker takes no more list jobs than it can run next: another one has the others."""
    gate = Gate(workers.folder / "models" / "slow", max_batch_size=2, shut=True)
    for number in (0, 1):
        workers.start(number, worker_models="slow")
    jobs = [client.submit_batch([[1.0]] * 10, model="slow") for _ in range(8)]
    wait_until(lambda: all(held_by(redis_server, number) for number in (0, 1)))
    held = [held_by(redis_server, number) for number in (0, 1)]
    assert max(held) <= 3
    gate.open()
    by = Counter(status.worker for status in client.as_completed(jobs, timeout_s=60))
    assert len(by) == 2


def test_workers_share_what_comes_one_by_one(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """Of models with very different batches, what waits for the small batches lies with nobody."""
    one = Gate(workers.folder / "models" / "one", max_batch_size=1, shut=True)
    sleeper(workers.folder / "models" / "many", 0.1, max_batch_size=64)
    for number in (0, 1):
        workers.start(number, worker_models="one,many")
    tasks = client.submit_many([[1.0]] * 30, model="one")
    wait_until(lambda: all(held_by(redis_server, number) for number in (0, 1)))
    assert max(held_by(redis_server, number) for number in (0, 1)) <= 5
    one.open()
    by = Counter(status.worker for status in client.as_completed(tasks, timeout_s=60))
    assert len(by) == 2
    assert not any(status.redelivered for status in client.as_completed(tasks, timeout_s=60))


def test_urgent_before_aged_jobs(workers: Workers, client: Client) -> None:
    """A list job that has aged goes first once; an urgent task waits for that one batch, not for the job."""
    gate = Gate(workers.folder / "models" / "slow", max_batch_size=1)
    jobs = [client.submit_batch([[2.0]] * 30, model="slow") for _ in range(2)]
    filler = client.submit_many([[1.0]] * 60, model="slow")
    gate.shut_at(2.0)
    workers.start(worker_models="slow", queue_ageing_s=0.5)
    wait_until(lambda: gate.held)
    # One that was claimed before, and one that has aged: the jobs have 59 more.
    assert batches_before({"priority": 9}, gate, client) <= 2
    client.results([*jobs, *filler], timeout_s=60)
    assert gate.first(2.0) < gate.last(1.0), "nothing had aged"


def test_large_jobs_leave_room_for_urgent_ones(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """However large what waits is, a worker holds few bytes of it, and urgent work overtakes it."""
    gate = Gate(workers.folder / "models" / "slow", max_batch_size=256, shut=True)
    large = [{"b64": "A" * 2_000_000, "dtype": "float32", "shape": [1]}]
    jobs = [client.submit_batch([[1.0], *large], model="slow") for _ in range(150)]
    workers.start(worker_models="slow")
    wait_until(lambda: gate.held)
    assert held_by(redis_server, 0) < 75  # 33 that run, and 33 that are next
    assert batches_before({"priority": 9}, gate, client) <= 1
    client.results(jobs, timeout_s=120)
    assert gate.first(URGENT) < gate.last(1.0)


def test_a_flood_of_later_tasks(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Tasks that wait for their time are in nobody's way."""
    app = Celery("stranger", broker=f"redis+socket://{redis_server.socket}", set_as_current=False)
    images, _ = load_test_images()
    for _ in range(600):
        app.send_task("gpuinfer.predict", [images[0].tolist()], queue="realtime", countdown=600)
    workers.start()
    wait_until(lambda: not redis_server.client().llen("realtime"))
    assert client.result(client.submit(images[0].tolist(), queue="batch"), timeout_s=60)


def test_ageing(workers: Workers, client: Client) -> None:
    """With ageing a starved queue gets a turn while urgent work goes on; without, it does not."""
    gate = Gate(workers.folder / "models" / "slow", max_batch_size=1)
    for ageing_s, served, starved, others in ((0.5, True, 1.0, 2.0), (0, False, 3.0, 4.0)):
        low = client.submit([starved], model="slow", queue="batch")
        urgent = client.submit_many([[others]] * 40, model="slow", queue="realtime", priority=9)
        worker = workers.start(worker_models="slow", queue_ageing_s=ageing_s)
        client.results([*urgent, low], timeout_s=60)
        assert (gate.first(starved) < gate.last(others)) is served
        worker.terminate()
