# SPDX-License-Identifier: Apache-2.0
"""What the shell offers for a task's id, with the rights that each command has."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from gpuinfer import Client
from gpuinfer.client.task_cli import task
from gpuinfer.queue import keys
from gpuinfer.settings import Settings
from tests.apis import HandWorker
from tests.brokers import PASSWORDS, OurRedis, our_redis

pytestmark = pytest.mark.integration


@pytest.fixture
def redis_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OurRedis]:
    with our_redis() as server:
        monkeypatch.setenv("GPUINFER_BROKER_URL", server.url)
        yield server


def offered(monkeypatch: pytest.MonkeyPatch, command: str, user: str, start: str = "") -> list[str]:
    """Return the ids that the shell offers a user of Redis for ``gpuinfer task COMMAND``."""
    monkeypatch.setenv("GPUINFER_BROKER_USERNAME", user)
    monkeypatch.setenv("GPUINFER_BROKER_PASSWORD", PASSWORDS[user])
    chosen = task.commands[command]
    argument = next(one for one in chosen.params if one.name in ("task_id", "task_ids"))
    return [one.value for one in argument.shell_complete(click.Context(chosen), start)]


def test_ids_of_tasks(redis_server: OurRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """To show: what ended; to retry: what failed; to cancel: what runs. Without Redis nothing."""
    with redis_server.client() as admin:
        worker = HandWorker(admin)
        worker.register()
        with Client(Settings.model_validate({"broker": redis_server.login("api")})) as client:
            done, failed, runs = (client.submit([1]) for _ in range(3))
        for outcome in ([1], ValueError("no digit")):
            (one,) = worker.claim(1)
            worker.begin(one)
            worker.finish(one, outcome)
        (held,) = worker.claim(1)
        admin.hset(keys.inflight(worker.store.worker), "running", str(held.seq))
        admin.zadd(keys.DEAD_AGES, {"letter": 1})
    assert offered(monkeypatch, "show", "api") == [failed, done]
    assert offered(monkeypatch, "show", "api", done[:-1]) == [done]
    assert offered(monkeypatch, "retry", "api") == [failed, "letter"]
    for user in ("worker", "admin", "operator"):
        assert offered(monkeypatch, "cancel", user) == [runs]
    assert redis_server.denied() == []
    redis_server.stop()
    assert [offered(monkeypatch, command, "admin") for command in ("show", "retry", "cancel")] == [[]] * 3
    redis_server.start()
