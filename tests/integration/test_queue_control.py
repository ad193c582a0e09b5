# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer queue purge``, ``pause`` and ``resume``, and ``celery purge``, as they are typed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from gpuinfer import Client
from gpuinfer.settings import Settings
from tests.apis import HandWorker
from tests.integration.test_queue_cli import Cli
from tests.services import RedisServer

pytestmark = pytest.mark.integration


@pytest.fixture
def cli(redis_server: RedisServer) -> Cli:
    return Cli(redis_server)


@pytest.fixture
def client(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Iterator[Client]:
    with Client(settings_for(redis_server)) as opened:
        yield opened


def test_purge_asks_first(cli: Cli, client: Client) -> None:
    """With the number of tasks; without --yes or a yes nothing is touched."""
    ids = [*client.submit_many([[1]] * 3), client.submit([1], queue="batch")]
    refused = cli("queue", "purge", text="n\n")
    assert refused.returncode == 1
    assert "4 tasks wait in all queues" in refused.stderr
    assert cli("queue", "purge", "realtime", "--json").returncode == 64
    assert client.status(ids[0]).state == "queued"
    assert cli.json("queue", "purge", "realtime", "--yes") == {"queue": "realtime", "purged": 3}
    assert [client.status(task_id).state for task_id in ids] == ["revoked"] * 3 + ["queued"]
    done = cli("queue", "purge", "batch", text="y\n")
    assert (done.returncode, done.stdout) == (0, "1 purged\n")
    assert cli("queue", "purge", "nothing").returncode == 64


def test_celery_purge(cli: Cli, client: Client) -> None:
    """Celery's own command ends the same tasks in the same way."""
    ids = [client.submit([1], priority=9), client.submit([1], queue="batch"), client.submit([1], model="ocr")]
    done = cli("celery", "purge", "-f")
    assert done.returncode == 0, done.stderr
    assert "Purged 3 messages" in done.stdout
    assert {client.status(task_id).state for task_id in ids} == {"revoked"}


def test_pause_and_resume(cli: Cli, client: Client, redis_server: RedisServer) -> None:
    """Tasks are accepted all the while; status names what is paused."""
    with redis_server.client() as connection:
        worker = HandWorker(connection)
        worker.beat()
        assert cli.json("queue", "pause", "batch") == {"queue": "batch", "paused": True, "changed": True}
        assert cli("queue", "pause", "batch").stdout == "batch: already paused\n"
        mistyped = cli("queue", "pause", "realtime.digit")
        assert "the fleet knows no model 'digit'; known: digits" in mistyped.stderr
        assert cli("queue", "resume", "realtime.digit").stderr == ""
        client.submit([1], queue="batch")
        assert worker.claim() == []
        assert cli.json("queue", "status")["paused"] == ["batch"]
        rows = [line.split() for line in cli("queue", "status").stdout.splitlines()]
        assert ["batch", "digits", "1", "0", "0:", "1", "paused"] in rows
        assert cli("queue", "resume", "batch").stdout == "batch: not paused\n"
        assert len(worker.claim()) == 1
