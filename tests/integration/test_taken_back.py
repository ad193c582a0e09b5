# SPDX-License-Identifier: Apache-2.0
"""A worker that a reaper took for dead, and that lives: it drops what it held, and serves on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.queue import depth, keys
from gpuinfer.settings import Settings
from gpuinfer.worker.restoring import put_back
from tests.models_for_tests import Latch, latched
from tests.orphans import check, elsewhere, ends, held, submit, wait_for_batch, watch
from tests.services import Process, RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def workers(redis_server: RedisServer, tmp_path: Path) -> Iterator[Workers]:
    made = Workers(redis_server, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def latch(workers: Workers) -> Latch:
    """Holds a batch back.

    The model has limits that no pause reaches: the kernel's timer runs on in a process that stands still, and
    would end one that was stopped for longer than its batch's hard limit as it goes on.
    """
    return latched(workers.folder / "models" / "slow", max_batch_size=4)


def later_entries(server: RedisServer) -> list[tuple[bytes, float]]:
    """Return what waits for its ETA, with when it is due."""
    raw: Any
    with server.client() as raw:
        lists = [name.decode() for name in raw.zrange(keys.LATER, 0, -1)]
        return [one for name in lists for one in raw.zrange(keys.later(name), 0, -1, withscores=True)]


def fall_due(server: RedisServer, task_id: str) -> None:
    """Let the ETA of the only task that waits for one have come."""
    raw: Any
    with server.client() as raw:
        (name,) = raw.zrange(keys.LATER, 0, -1)
        (payload,) = raw.zrange(keys.later(name.decode()), 0, -1)
        message = json.loads(payload)
        assert message["headers"]["id"] == task_id
        message["headers"]["eta"] = "2026-01-01T00:00:00+00:00"
        with raw.pipeline() as pipe:
            pipe.delete(keys.later(name.decode()))
            pipe.zadd(keys.later(name.decode()), {json.dumps(message): 1})
            pipe.zadd(keys.LATER, {name: 1})
            pipe.set(keys.DUE, 1)
            pipe.execute()


def serves_on(worker: Process, client: Client, redis_server: RedisServer, tasks: int) -> None:
    """The process is the same, has said once what happened, and serves what comes."""
    wait_until(lambda: held(redis_server) == {}, 180)
    assert ends(redis_server) == {"completed": tasks}
    check(client, submit(client, 1))
    assert worker.running
    assert worker.text().count('"taken_back"') == 1
    for trouble in ('"worker_ends"', '"batch_unfinished"', "Traceback"):
        assert trouble not in worker.text()


def test_by_force_in_mid_batch(
    workers: Workers,
    redis_server: RedisServer,
    client: Client,
    settings_for: Callable[..., Settings],
    latch: Latch,
) -> None:
    """A job whose first batch runs, and that has slices left, ends once; a task that came to this worker and
    waits for its time does so in Redis, where no reaper has anything to do with it."""
    worker = elsewhere(workers, "cut-off")
    url = f"redis+socket://{redis_server.socket}"
    stranger = Celery("stranger", broker=url, backend=url, set_as_current=False)
    due = {"queue": "realtime", "countdown": 3600}
    later = stranger.send_task("gpuinfer.predict", [[0.0]], {"model": "slow"}, **due)
    wait_until(lambda: depth.read(redis_server.client()).total_later == 1, 60)
    assert held(redis_server) == {}
    waiting = later_entries(redis_server)
    job = client.submit_batch([[1.0], [0.0], [0.0], [0.0], [0.0], [0.0]], model="slow", queue="realtime")
    wait_for_batch(redis_server, "gpu0@cut-off", 1)
    done = put_back(settings_for(redis_server), "gpu0@cut-off", force=True)  # what restore --name calls
    assert done.ids == (job,)
    latch.open()
    assert worker.wait_for_line('"taken_back"', 180)
    answers = [answer["outputs"]["twice"] for answer in client.result(job, timeout_s=120)]
    assert answers == [[2.0], [0.0], [0.0], [0.0], [0.0], [0.0]]
    assert later_entries(redis_server) == waiting
    fall_due(redis_server, later.id)
    assert later.get(timeout=120)["outputs"]["twice"] == [0.0]
    stranger.close()
    serves_on(worker, client, redis_server, 2)


def test_a_partition(workers: Workers, redis_server: RedisServer, client: Client, latch: Latch) -> None:
    """Cut off for longer than is set, in mid-batch: another worker serves its tasks, and it comes back."""
    worker = elsewhere(workers, "cut-off")
    ids = submit(client, 4)
    wait_for_batch(redis_server, "gpu0@cut-off", 4)
    worker.send(signal.SIGSTOP)
    watcher = watch(workers)
    watcher.wait_for_line('"reaped"', 180)
    wait_until(lambda: held(redis_server).get(NAME), 180)
    latch.open()
    check(client, ids)
    assert watcher.terminate(90) == 0
    worker.send(signal.SIGCONT)
    worker.wait_for_line('"taken_back"', 180)
    serves_on(worker, client, redis_server, 4)
