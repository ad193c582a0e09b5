# SPDX-License-Identifier: Apache-2.0
"""Errors of Redis as clients, HTTP callers and programs meet them: a right that is missing, a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpuinfer import AsyncClient, Client
from gpuinfer.errors import BrokerError, BrokerRefused, ClusterUnsupported
from tests.apis import Api
from tests.conftest import RedisFactory
from tests.services import RedisServer, free_port
from tests.workers import Workers

pytestmark = pytest.mark.integration

EX_CONFIG = 78
PROGRAMS = {
    "worker": ("worker", "0"),
    "front": ("api", "--port", "0"),
    "watcher": ("watcher", "run", "--dry-run"),
    "submit": ("submit", "[1]"),
}


@pytest.fixture
def cluster(redis_factory: RedisFactory) -> RedisServer:
    """A Redis Cluster of one node, which serves all slots."""
    server = redis_factory(port=free_port(), cluster_enabled="yes", cluster_port=free_port())
    with server.client() as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    return server


def url_of(server: RedisServer, user: str) -> str:
    return server.url.replace("unix://", f"unix://{user}:pw@")


async def test_a_missing_right_is_named_to_clients(redis_server: RedisServer) -> None:
    """Not "Redis does not answer": the user and the command."""
    with redis_server.client() as admin:
        admin.execute_command(
            *("ACL", "SETUSER", "weak", "on", ">pw", "~*", "&*", "+@all", "-evalsha", "-subscribe")
        )
    url = url_of(redis_server, "weak")
    with Client(url) as client:
        for call in (lambda: client.submit([1]), lambda: client.submit_many([1]), lambda: client.cancel("x")):
            with pytest.raises(BrokerRefused, match=r"Redis user weak lacks.*evalsha"):
                call()
    async with AsyncClient(url) as later:
        with pytest.raises(BrokerRefused, match=r"Redis user weak lacks.*evalsha"):
            await later.submit([1])


def test_http_callers_are_not_told_to_try_again(redis_server: RedisServer, tmp_path: Path) -> None:
    """A right that lacks: 500 with its code, and no Retry-After; a foreign key under a name of ours: 409."""
    with redis_server.client() as admin:
        admin.execute_command(*("ACL", "SETUSER", "weak", "on", ">pw", "~*", "&*", "+@all", "-evalsha"))
        with Api(redis_server, tmp_path, broker_url=url_of(redis_server, "weak")) as api:
            answer = api.http.post("/predict", json=[1])
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "broker_refused")
            assert "retry-after" not in answer.headers
            admin.execute_command("ACL", "SETUSER", "weak", "+evalsha")
            admin.set("gpuinfer:default-model", "digits")
            admin.sadd("celery-task-meta-x", 1)
            answer = api.http.get("/result/x")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "unreadable_result")
            assert "another program uses that key" in answer.json()["error"]["message"]


async def test_clients_refuse_a_cluster(cluster: RedisServer) -> None:
    """By name, at the first call, in both drivers."""
    with Client(cluster.url) as client, pytest.raises(ClusterUnsupported, match="Redis Cluster"):
        client.submit([1])
    async with AsyncClient(cluster.url) as later:
        with pytest.raises(ClusterUnsupported, match="Redis Cluster"):
            await later.submit([1])
    assert not issubclass(ClusterUnsupported, BrokerError)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_refuse_a_cluster(name: str, cluster: RedisServer, tmp_path: Path) -> None:
    """They end with 78 at once, and touch nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "gpuinfer", *PROGRAMS[name]],
        env=Workers(cluster, tmp_path).environment(watcher_backend="process"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == EX_CONFIG, done.stderr
    assert "part of a Redis Cluster" in done.stderr
    with cluster.client() as client:
        assert client.dbsize() == 0


def test_doctor_finds_a_cluster(cluster: RedisServer, tmp_path: Path) -> None:
    """It is not green where nothing would work."""
    done = subprocess.run(
        [sys.executable, "-m", "gpuinfer", "doctor", "redis.reach", "--json"],
        env=Workers(cluster, tmp_path).environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert "part of a Redis Cluster" in json.dumps(found)
    assert done.returncode != 0
