# SPDX-License-Identifier: Apache-2.0
"""Who waits hears of an end once: a client on its reply channel, anybody else by the task's id."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.errors import TaskRevoked
from gpuinfer.queue import keys
from gpuinfer.queue.connection import celery_urls, tls_options
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings
from tests.contract.conftest import commands, done, on
from tests.services import Process
from tests.workers import wait_until

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]


@pytest.fixture
def listen(store: Store) -> Iterator[Callable[..., Any]]:
    """Subscribe to channels; return a function that gives what has been heard since: channel, data."""
    opened: list[Any] = []

    def to(*channels: str) -> Callable[[], list[tuple[str, Any]]]:
        heard: Any = store.client.pubsub(ignore_subscribe_messages=False)  # type: ignore[no-untyped-call]
        opened.append(heard)
        heard.subscribe(*channels)
        for _ in channels:
            assert heard.get_message(timeout=60)["type"] == "subscribe"

        def since() -> list[tuple[str, Any]]:
            heard.ping("end")
            found = []
            while (event := heard.get_message(timeout=60))["type"] == "message":
                found.append((event["channel"].decode(), orjson.loads(event["data"])))
            assert event["type"] == "pong"
            return found

        return since

    yield to
    for heard in opened:
        heard.close()


def subscribed(store: Store, channel: str) -> int:
    raw: Any = store.client
    return int(raw.pubsub_numsub(channel)[0][1])


def ids_of(found: list[tuple[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the channel of each publication, and the ids it tells."""
    return [
        (channel, [meta["task_id"] for meta in (data if isinstance(data, list) else [data])])
        for channel, data in found
    ]


def finish(store: Store, count: int = 100, **changes: Any) -> list[str]:
    """Settle what waits as one batch, on the reply channels that the messages name."""
    finals = [
        done(task)._replace(reply=decode(task.payload).reply_to, **changes) for task in store.claim(count)
    ]
    commands(store)
    assert store.settle(finals) == {}
    return [final.task_id for final in finals]


def test_one_publication_a_batch_and_client(store: Store, client: Client, listen: Any) -> None:
    """A batch of two clients' tasks is told to each once, on its own channel, and to nobody by id."""
    other = Client(client._settings)
    mine, its = client.submit_many([[1]] * 5), other.submit_many([[1]] * 3)
    since = listen(client._origin.channel, other._origin.channel)
    finish(store)
    assert commands(store, "publish") == 2
    assert sorted(ids_of(since())) == sorted([(client._origin.channel, mine), (other._origin.channel, its)])
    other.close()


def test_nobody_listens(store: Store, client: Client) -> None:
    """Nothing is published, and one look tells so."""
    client.submit_many([[1]] * 50)
    finish(store)
    counts = store.client.info("commandstats")
    assert "cmdstat_publish" not in counts
    assert counts["cmdstat_pubsub|numsub"]["calls"] == 1


def test_who_listens_by_id(store: Store, client: Client, listen: Any) -> None:
    """Only what somebody has subscribed to is published by id; the client hears of all on its channel."""
    tasks = client.submit_many([[1]] * 5)
    since = listen(keys.result(tasks[2]), client._origin.channel)
    finish(store)
    assert commands(store, "publish") == 2
    assert sorted(ids_of(since())) == sorted(
        [(keys.result(tasks[2]), tasks[2:3]), (client._origin.channel, tasks)]
    )


@pytest.mark.parametrize("keep", [True, False])
def test_an_end_is_heard_once(store: Store, client: Client, listen: Any, *, keep: bool) -> None:
    """Whatever comes after it: the same again, another end, a cancellation."""
    client.submit([1], ignore_result=not keep)
    (task,) = store.claim(1)
    final = done(task)._replace(reply=client._origin.channel, keep=keep)
    since = listen(client._origin.channel, keys.result(final.task_id))
    for _ in range(3):
        store.settle([final, final])
        assert not client.cancel(final.task_id)
    assert sorted(channel for channel, _ in since()) == sorted(
        [client._origin.channel, keys.result(final.task_id)]
    )
    assert since() == []


def test_a_cancellation_by_another_client(store: Store, client: Client) -> None:
    """It reaches who waits on the reply channel."""
    task = client.submit([1])
    with ThreadPoolExecutor(1) as pool, Client(client._settings) as other:
        waiting = pool.submit(client.result, task, 60)
        wait_until(lambda: subscribed(store, client._origin.channel))
        assert other.cancel(task)
        with pytest.raises(TaskRevoked):
            waiting.result(60)


def test_a_burial_is_heard(store: Store, client: Client, listen: Any) -> None:
    """On the channel that the message names, as any other end."""
    task_id = client.submit([1])
    since = listen(client._origin.channel)
    store.claim(1, begin=True)
    store.restore()
    assert since() == []
    store.claim(1, begin=True)
    assert store.restore().dead == (task_id,)
    assert ids_of(since()) == [(client._origin.channel, [task_id])]


def test_two_processes_wait_for_one_task(
    store: Store, client: Client, broker: BrokerSettings, tmp_path: Path
) -> None:
    """The one that submitted it, and another one that knows its id."""
    task = client.submit([1])
    environ = os.environ | {"GPUINFER_BROKER_URL": broker.url}
    if broker.password is not None:
        environ["GPUINFER_BROKER_PASSWORD"] = broker.password.get_secret_value()
    if broker.tls_ca is not None:
        environ["GPUINFER_BROKER_TLS_CA"] = str(broker.tls_ca)
    code = f"from gpuinfer import Client; print(Client().result({task!r}, timeout_s=60))"
    with (
        Process([sys.executable, "-c", code], tmp_path / "other.log", env=environ) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.result, task, 60)
        for channel in (client._origin.channel, keys.result(task)):
            wait_until(lambda channel=channel: subscribed(store, channel), 60)  # type: ignore[misc]
        finish(store)
        assert waiting.result(60) == 1
        assert other.wait(60) == 0
        assert other.text() == "1\n"


def test_stock_celery_waits(store: Store, client: Client, broker: BrokerSettings) -> None:
    """Its AsyncResult subscribes by id, as with any other back end of Redis."""
    task = client.submit([1])
    app = Celery("stranger", backend=celery_urls(broker)[1], set_as_current=False)
    app.conf.redis_backend_use_ssl = tls_options(broker)
    with app, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(app.AsyncResult(task).get, timeout=60)
        wait_until(lambda: subscribed(store, keys.result(task)))
        finish(store)
        assert waiting.result(60) == 1


def test_an_id_tells_whose_it_is(client: Client) -> None:
    """A client knows the tasks it has made, and no others, without keeping them."""
    with Client(client._settings) as other:
        task = client.submit([1])
        assert client._origin.made(task)
        assert not other._origin.made(task)
