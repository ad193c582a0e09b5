# SPDX-License-Identifier: Apache-2.0
"""The format number: a program that meets another one says which, and ends (78) before it writes anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.errors import FormatMismatch
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys
from tests.apis import Api
from tests.conftest import RedisFactory
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration

IMAGE = load_test_images()[0][0].tolist()
LABEL = str(load_test_images()[1][0])
#: What every program says.
SAID = "the data in Redis has format 3, but this program reads only format 2; a newer version wrote it"
EX_CONFIG = 78


def gpuinfer(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpuinfer", *arguments]


def other(server: RedisServer) -> dict[bytes, bytes | None]:
    """Put into a Redis what another edition might have left; return it."""
    with server.client() as client:
        client.set(keys.FORMAT_KEY, "3")
        client.hset(keys.DEAD, "letter", "{}")
        client.hset(keys.inflight(NAME), mapping={"1": "{}", "1:list": "realtime", "running": "1"})
        client.hset(keys.epoch(NAME), "number", "7")
        client.lpush("realtime", "{}")
        client.set(keys.result("waiting"), '{"status": "PENDING", "result": null}')
    return contents(server)


def contents(server: RedisServer) -> dict[bytes, bytes | None]:
    with server.client() as client:
        return {key: client.dump(key) for key in client.scan_iter()}


def run(command: Sequence[str], workers: Workers) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, env=workers.environment(), capture_output=True, text=True, timeout=120
    )


COMMANDS = [
    ("submit", "[1]"),
    ("submit", "--wait", "[1]"),
    ("submit", "[1]", "[2]"),
    ("result", "waiting"),
    ("result", "waiting", "--wait", "30"),
    ("cancel", "waiting"),
    ("queue", "status"),
    ("dead", "list"),
    ("dead", "retry", "letter"),
    ("dead", "drop", "--all"),
    ("restore", "0"),
    ("watcher", "explain"),
    ("redis", "migrate"),
    ("celery", "call", "gpuinfer.predict"),
    ("celery", "inspect", "ping"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands(redis_server: RedisServer, workers: Workers, command: tuple[str, ...]) -> None:
    """Each command says which format it has met, and changes nothing."""
    before = other(redis_server)
    done = run(gpuinfer(*command), workers)
    # Celery's own command gives 69 for whatever keeps it from asking.
    code = 69 if command[:2] == ("celery", "inspect") else EX_CONFIG
    assert done.returncode == code, done.stdout + done.stderr
    assert SAID in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(redis_server) == before


def test_json(redis_server: RedisServer, workers: Workers) -> None:
    """A program that asked for JSON reads the code."""
    other(redis_server)
    for command in (["submit", "--json", "[1]"], ["redis", "migrate", "--json"]):
        done = run(gpuinfer(*command), workers)
        assert done.returncode == EX_CONFIG
        assert json.loads(done.stdout)["error"]["code"] == "format_mismatch"


PROGRAMS = {
    "worker": gpuinfer("worker", "0"),
    "worker by Celery": [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "gpuinfer",
        "worker",
        "-n",
        NAME,
        "-P",
        "solo",
    ],
    "watcher": gpuinfer("watcher", "run"),
    "watcher, dry run": gpuinfer("watcher", "run", "--dry-run"),
    "api": gpuinfer("api", "--port", "0"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(redis_server: RedisServer, workers: Workers, program: str) -> None:
    """Each program ends at its start."""
    before = other(redis_server)
    process = workers.spawn(*PROGRAMS[program], name="program", watcher_backend="process")
    assert process.wait(60) == EX_CONFIG, process.text()
    assert SAID in process.text()
    assert contents(redis_server) == before


@pytest.fixture
def on_one_port(redis_factory: RedisFactory) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A Redis, and another one of another format that can take its place."""
    first, second = redis_factory(), redis_factory()
    other(second)
    yield first, second


def switch(first: RedisServer, second: RedisServer) -> None:
    """Put the second Redis where the first one was, as a changed name or a failover would."""
    first.kill()
    Path(first.socket).unlink(missing_ok=True)
    os.link(second.socket, first.socket)


def test_a_worker_meets_another_format_later(
    on_one_port: tuple[RedisServer, RedisServer], tmp_path: Path
) -> None:
    """Somebody has put another Redis under a worker: it ends when it connects, and writes nothing there."""
    first, second = on_one_port
    workers = Workers(first, tmp_path)
    try:
        process = workers.start()
        before = contents(second)
        switch(first, second)
        assert process.wait(60) == EX_CONFIG, process.text()
        ends = json.loads(next(line for line in process.text().splitlines() if '"worker_ends"' in line))
        assert ends["code"] == "format_mismatch"
        assert SAID in ends["reason"]
        assert contents(second) == before
    finally:
        workers.close()


def test_a_watcher_meets_another_format_later(
    on_one_port: tuple[RedisServer, RedisServer], tmp_path: Path
) -> None:
    """A watcher, too; its workers run on until they find out themselves."""
    first, second = on_one_port
    workers = Workers(first, tmp_path)
    try:
        process = workers.spawn(*PROGRAMS["watcher, dry run"], name="watcher", watcher_backend="process")
        process.wait_for_line('"watching"')
        process.wait_for_line('"hold"')
        before = contents(second)
        switch(first, second)
        assert process.wait(60) == EX_CONFIG, process.text()
        assert contents(second) == before
    finally:
        workers.close()


def test_the_front_meets_another_format_later(
    on_one_port: tuple[RedisServer, RedisServer], tmp_path: Path
) -> None:
    """The front stays, and answers 503 with the code, also to who waits already; it is not ready."""
    first, second = on_one_port
    with Api(first, tmp_path) as api:
        assert api.http.get("/health/ready").json()["error"]["code"] == "not_ready"  # no worker
        task = api.http.post("/predict", json=[1]).json()["task_id"]
        before = contents(second)
        switch(first, second)
        for method, path in (
            ("GET", "/health/ready"),
            ("GET", f"/result/{task}"),
            ("GET", f"/result/{task}?wait=20"),
            ("POST", "/predict"),
            ("POST", f"/cancel/{task}"),
        ):
            answer = api.http.request(method, path, json=[1] if method == "POST" else None)
            assert answer.status_code == 503, (path, answer.text)
            assert answer.json()["error"]["code"] == "format_mismatch"
        assert api.process.running
        assert contents(second) == before


def test_who_waits_is_told(on_one_port: tuple[RedisServer, RedisServer]) -> None:
    """A wait that began before ends with the error, not with its time."""
    first, second = on_one_port
    with Client(first.url) as client:
        task = client.submit([1])
        ending = client.as_completed([task], 300)
        switch(first, second)
        with pytest.raises(FormatMismatch, match="has format 3"):
            next(ending)


def test_the_number_changes_under_a_connection(redis_server: RedisServer) -> None:
    """Where the data is exchanged and the connection stays, the next submission says so."""
    with Client(redis_server.url) as client:
        client.submit([1])
        with redis_server.client() as admin:
            admin.set(keys.FORMAT_KEY, "3")
        with pytest.raises(FormatMismatch, match="has format 3"):
            client.submit([1])


# -- an empty Redis -----------------------------------------------------------------------


def test_migrate(redis_server: RedisServer, workers: Workers) -> None:
    """There is nothing to change yet, and it says so."""
    done = run(gpuinfer("redis", "migrate"), workers)
    assert (done.returncode, done.stdout) == (
        0,
        "nothing to do: Redis has no format yet; the first worker or watcher makes it 2\n",
    )
    with redis_server.client() as client:
        assert not client.exists(keys.FORMAT_KEY)
        client.set(keys.FORMAT_KEY, keys.FORMAT)
    done = run(gpuinfer("redis", "migrate", "--json"), workers)
    assert json.loads(done.stdout) == {"format": 2, "found": 2, "changed": False}
    done = run(gpuinfer("redis", "migrate", "--help"), workers)
    assert "gpuinfer redis migrate --json" in done.stdout
    with redis_server.client() as client:
        client.set(keys.FORMAT_KEY, "1")
    done = run(gpuinfer("redis", "migrate"), workers)
    assert done.returncode == EX_CONFIG
    assert "has format 1, but this program reads only format 2" in done.stderr


def test_a_client_sets_no_number(redis_server: RedisServer) -> None:
    """Who only submits leaves the number to those who keep what lies there."""
    with Client(redis_server.url) as client, redis_server.client() as admin:
        client.submit([1])
        assert not admin.exists(keys.FORMAT_KEY)


def test_a_watcher_sets_the_number(redis_server: RedisServer, workers: Workers) -> None:
    """The first watcher gives an empty Redis its number; one that only looks does not."""
    dry = workers.spawn(*PROGRAMS["watcher, dry run"], name="dry", watcher_backend="process")
    dry.wait_for_line('"hold"')
    with redis_server.client() as admin:
        assert not admin.exists(keys.FORMAT_KEY)
        workers.spawn(*PROGRAMS["watcher"], name="watcher", watcher_backend="process")
        wait_until(lambda: admin.get(keys.FORMAT_KEY) == b"2", 60)


def test_what_waits_for_the_first_worker(redis_server: RedisServer, workers: Workers) -> None:
    """What waits in kombu's lists before anything of gpuinfer has run is Celery's format: it runs."""
    url = f"redis+socket://{redis_server.socket}"
    with Celery("plain", broker=url, backend=url, set_as_current=False) as app:
        sent = [
            app.send_task("gpuinfer.predict", [IMAGE], queue=queue, priority=priority)
            for queue, priority in (("realtime", None), ("default", 4), ("batch", 9))
        ]
        with redis_server.client() as admin:
            assert not any(key.startswith(b"gpuinfer:") for key in admin.scan_iter())
            workers.start()
            assert [task.get(timeout=60)["label"] for task in sent] == [LABEL] * 3
            assert admin.get(keys.FORMAT_KEY) == b"2"
