# SPDX-License-Identifier: Apache-2.0
"""Time limits on the solo pool, deaths and poison: who ends, who runs again, who is set aside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.errors import DeadLettered, InputError, SoftTimeLimitExceeded, TimeLimitExceeded
from gpuinfer.queue import keys
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.worker.ceiling import EX_HARD_LIMIT
from tests.models_for_tests import picky, sleeper
from tests.services import RedisServer
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.faults

#: A soft limit that a busy machine does not make the innocent pass, and what takes longer.
SOFT_S, SLOW_S = 2.0, 2.1


def only_the_slow_one_fails(client: Client, **limits: float) -> bool:
    """Submit a batch with a task that is too slow: it fails for that; return whether all others succeed.

    One that the machine has held up for longer than the limit fails rightly.
    """
    inputs = [[0.0], [0.0], [1.0], [0.0]]
    tasks = client.submit_many(inputs, model="slow", **limits)  # type: ignore[arg-type]
    answers = client.results(tasks, timeout_s=60, return_errors=True)
    assert isinstance(answers[2], SoftTimeLimitExceeded)
    assert all(isinstance(answer, dict | SoftTimeLimitExceeded) for answer in answers), answers
    return [isinstance(answer, dict) for answer in answers] == [True, True, False, True]


def test_hard_limit_ends_the_offender_alone(workers: Workers, client: Client) -> None:
    """A batch past its hard limit ends the process, even in native code; only the offender fails."""
    sleeper(workers.folder / "models" / "slow", 30, hard_time_limit_s=4.0, soft_time_limit_s=3.5)
    good = client.submit_many([[0.0]] * 5, model="slow")
    bad = client.submit([1.0], model="slow")
    good += client.submit_many([[0.0]] * 5, model="slow")
    ends = []
    while not all(client.status(task).final for task in [*good, bad]):
        ends.append(workers.start(worker_models="slow", traced=False))
        wait_until(lambda: not ends[-1].running or all(client.status(t).final for t in [*good, bad]), 60)
    assert [end.returncode for end in ends if not end.running] == [EX_HARD_LIMIT] * 2
    assert len(client.results(good, timeout_s=60)) == 10
    with pytest.raises(TimeLimitExceeded):
        client.result(bad, timeout_s=60)
    assert client.status(good[0]).redelivered


def test_soft_limit_fails_the_offender_alone(workers: Workers, client: Client) -> None:
    """A batch past its soft limit is run again one by one; the process lives, only the offender fails."""
    sleeper(workers.folder / "models" / "slow", SLOW_S, soft_time_limit_s=SOFT_S)
    worker = workers.start(worker_models="slow")
    wait_until(lambda: only_the_slow_one_fails(client))
    worker.wait_for_line('"batch_too_slow".*each task runs again, alone')
    assert worker.running


def test_a_list_job_past_its_soft_limit(workers: Workers, client: Client) -> None:
    """In a list job only the slow inputs end too long; it does not go round for ever."""
    sleeper(workers.folder / "models" / "slow", SLOW_S, soft_time_limit_s=SOFT_S)
    worker = workers.start(worker_models="slow")

    def only_the_slow_input_fails() -> bool:
        job = client.submit_batch([[0.0], [1.0], [0.0], [0.0]], model="slow")
        errors = [answer.get("error") for answer in client.result(job, timeout_s=60)]
        assert errors[1] is not None
        assert {error["code"] for error in errors if error} == {"soft_time_limit_exceeded"}
        return errors.count(None) == 3  # else the machine has held up another one for longer than the limit

    wait_until(only_the_slow_input_fails)
    assert worker.running


def test_a_request_limits_its_whole_job(workers: Workers, client: Client) -> None:
    """The limit a request asks for is for all slices together; the model's is for one."""
    sleeper(
        workers.folder / "models" / "slow", 0.2, max_batch_size=1, soft_time_limit_s=5, hard_time_limit_s=9
    )
    workers.start(worker_models="slow")
    assert len(client.result(client.submit_batch([[1.0]] * 8, model="slow"), timeout_s=60)) == 8
    job = client.submit_batch([[1.0]] * 1000, model="slow", soft_time_limit_s=1)  # 200 s of work
    with pytest.raises(SoftTimeLimitExceeded):
        client.result(job, timeout_s=60)


def test_request_overrides_limits_within_the_maximum(workers: Workers, client: Client) -> None:
    """A request may ask for another limit; more than the model's maximum is cut to it."""
    sleeper(workers.folder / "models" / "slow", 1.0, soft_time_limit_s=0.3, hard_time_limit_s=60)
    workers.start(worker_models="slow")
    assert client.result(client.submit([1.0], model="slow", soft_time_limit_s=30), timeout_s=60)
    with pytest.raises(SoftTimeLimitExceeded):
        client.result(client.submit([1.0], model="slow", soft_time_limit_s=0.1), timeout_s=60)


def test_a_hard_limit_for_a_whole_job(workers: Workers, client: Client) -> None:
    """A request's hard limit alone ends its list job, between slices or in one; the process lives."""
    sleeper(
        workers.folder / "models" / "slow", 0.1, max_batch_size=1, soft_time_limit_s=5, hard_time_limit_s=9
    )
    worker = workers.start(worker_models="slow")
    job = client.submit_batch([[1.0]] * 2000, model="slow", time_limit_s=0.55)  # 200 s of work
    with pytest.raises(TimeLimitExceeded):
        client.result(job, timeout_s=60)
    assert worker.running


def test_a_tiny_limit_ends_no_process(workers: Workers, client: Client) -> None:
    """A request may allow next to nothing: its task fails, and nobody's worker with it."""
    sleeper(workers.folder / "models" / "slow", 0.1, soft_time_limit_s=5, hard_time_limit_s=9)
    worker = workers.start(worker_models="slow", traced=False)
    tasks = [client.submit([1.0], model="slow", time_limit_s=0.001) for _ in range(4)]
    tasks.append(client.submit_batch([[1.0]] * 16, model="slow", time_limit_s=0.001))
    answers = client.results(tasks, timeout_s=60, return_errors=True)
    assert all(isinstance(answer, TimeLimitExceeded) for answer in answers[:4])
    assert isinstance(answers[4], TimeLimitExceeded)
    assert client.result(client.submit([1.0], model="slow"), timeout_s=60)
    assert worker.running


def test_a_requests_limit_spares_its_neighbours(workers: Workers, client: Client) -> None:
    """Of tasks with a limit of their own that share a batch, only the one fails that is slow by itself."""
    sleeper(workers.folder / "models" / "slow", SLOW_S)
    worker = workers.start(worker_models="slow", traced=False)
    wait_until(lambda: only_the_slow_one_fails(client, soft_time_limit_s=SOFT_S))
    worker.wait_for_line('"batch_too_slow".*each task runs again, alone')


def test_urgent_between_slices_that_are_too_slow(workers: Workers, client: Client) -> None:
    """While a slow job is cut into smaller and smaller slices, an urgent task gets in between."""
    sleeper(workers.folder / "models" / "slow", 0.3, max_batch_size=32, soft_time_limit_s=0.15)
    workers.start(worker_models="slow", traced=False)
    job = client.submit_batch([[1.0]] * 320, model="slow")  # 200 s of work
    wait_until(lambda: client.status(job).state == "running")
    client.result(client.submit([0.0], model="slow", soft_time_limit_s=30), timeout_s=60)
    assert client.status(job).state == "running"


def test_failing_item_in_a_batch(workers: Workers, client: Client) -> None:
    """A model that fails on one item of a batch fails that one; its neighbours are answered."""
    picky(workers.folder / "models" / "picky")
    values = [1.0] * 20
    values[7] = -1.0
    ids = client.submit_many([[value] for value in values], model="picky")
    workers.start(worker_models="picky")
    answers = client.results(ids, timeout_s=60, return_errors=True)
    assert [i for i, answer in enumerate(answers) if isinstance(answer, Exception)] == [7]


def test_poison_takes_two_workers_and_no_neighbour(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """A task that its worker never survives goes to the dead letters after two deaths; the others succeed."""
    sleeper(workers.folder / "models" / "slow", 60, max_batch_size=16)
    innocent = client.submit_many([[0.0]] * 6, model="slow")
    poison = client.submit([1.0], model="slow")
    innocent += client.submit_many([[0.0]] * 6, model="slow")
    raw, deaths = redis_server.client(), 0
    while not all(client.status(task).final for task in [*innocent, poison]):
        worker = workers.start(worker_models="slow")
        while worker.running and not all(client.status(task).final for task in [*innocent, poison]):
            if client.status(poison).state == "running":
                worker.kill()  # as a driver's fault would
                deaths += 1
            time.sleep(0.02)
    assert deaths == 2
    assert len(client.results(innocent, timeout_s=60)) == 12
    with pytest.raises(DeadLettered):
        client.result(poison, timeout_s=60)
    letter = json.loads(raw.hget(keys.DEAD, poison) or b"")
    assert letter["deaths"] == 2


def test_a_message_that_no_error_text_can_hold(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """Half a surrogate pair in a stranger's input fails that task; its neighbours are answered."""
    sleeper(workers.folder / "models" / "slow", 0.2)
    bare = Celery("bare", broker=f"redis+socket://{redis_server.socket}", set_as_current=False)
    good = client.submit_many([[1.0]] * 3, model="slow")
    bad = [
        bare.send_task("gpuinfer.predict", [value], {"model": "slow"}, queue="realtime").id
        for value in ({"b64": "", "\ud800": 1}, {"b64": "", "dtype": "\ud800", "shape": [1]}, {"\ud800": 2})
    ]
    worker = workers.start(worker_models="slow")
    assert len(client.results(good, timeout_s=60)) == 3
    raw = redis_server.client()
    wait_until(lambda: all(b"FAILURE" in (raw.get(keys.result(task)) or b"") for task in bad))
    for task in bad:
        with pytest.raises(InputError):
            client.result(task, timeout_s=60)
    assert client.result(client.submit([1.0], model="slow"), timeout_s=60)
    assert worker.running


def test_restore_command(workers: Workers, client: Client) -> None:
    """``gpuinfer restore N`` is refused while worker N runs, and puts its tasks back when it is dead."""
    sleeper(workers.folder / "models" / "slow", 60, max_batch_size=2)
    tasks = client.submit_many([[1.0]] * 4, model="slow")
    worker = workers.start(worker_models="slow")
    wait_until(lambda: client.status(tasks[0]).state == "running")
    command = [sys.executable, "-m", "gpuinfer", "restore", "0"]
    environment = workers.environment()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 73
    assert f"process {worker.pid}" in refused.stderr
    worker.send(signal.SIGKILL)
    worker.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "2 tasks put back" in done.stdout  # behind a long batch nothing was claimed
    assert read_depth(workers.redis.client()).lanes == {("realtime", "slow"): {0: 4}}
