# SPDX-License-Identifier: Apache-2.0
"""A server of each kind, and what the tests of the queue's contract do with tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gpuinfer import Client
from gpuinfer.client.calls import bulk
from gpuinfer.queue import results
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import PREDICT, decode
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import QUEUES, BrokerSettings, QueueSettings, Settings
from tests.conftest import need
from tests.services import RedisServer, free_port, make_certificate, redis_binary, valkey_binary


def _serve(kind: str, folder: Path) -> tuple[RedisServer, BrokerSettings]:
    server, way = kind.split("-")
    binary = {"redis": redis_binary(), "valkey": valkey_binary()}[server]
    need(binary is not None, f"{server}-server")
    port = free_port()
    if way == "socket":
        made = RedisServer(binary)
        return made, BrokerSettings(url=made.url)
    if way == "tcp":
        made = RedisServer(binary, port=port, requirepass="a:b/c@d")
        return made, BrokerSettings(url=f"redis://127.0.0.1:{port}/0", password=SecretStr("a:b/c@d"))
    certificate, key = make_certificate(folder)
    made = RedisServer(
        binary,
        tls_port=port,
        tls_cert_file=str(certificate),
        tls_key_file=str(key),
        tls_ca_cert_file=str(certificate),
        tls_auth_clients="no",
    )
    return made, BrokerSettings(url=f"rediss://127.0.0.1:{port}/0", tls_ca=certificate)


KINDS = ("redis-socket", "redis-tcp", "redis-tls", "valkey-socket", "valkey-tls")


def on(*kinds: str) -> pytest.MarkDecorator:
    """Run a module's tests on these servers alone: what scripts decide does not depend on the connection."""
    return pytest.mark.parametrize("broker", kinds, indirect=True)


@pytest.fixture(params=KINDS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerSettings]:
    """The settings of a server of each kind."""
    server, settings = _serve(request.param, tmp_path)
    try:
        yield settings
    finally:
        server.close()


@pytest.fixture(autouse=True)
def _standing_clocks(standing_clocks: None) -> None:
    """Who is idle here counts however long a test takes; ``COUNTS_S`` ago is gone."""


@pytest.fixture
def client(broker: BrokerSettings) -> Iterator[Client]:
    with Client(Settings(broker=broker)) as opened:
        yield opened


@pytest.fixture
def store(broker: BrokerSettings) -> Store:
    return store_of(broker)


def store_of(
    broker: BrokerSettings,
    worker: str = "gpu0@here",
    models: Sequence[str] = ("digits",),
    *,
    default: str = "digits",
    ageing_s: float = 0,
    settings: QueueSettings | None = None,
) -> Store:
    """Return the store of a worker that has said what it serves; its claims are sent once."""
    settings = settings or QueueSettings(ageing_s=ageing_s)
    made = Store(connect(broker, retries=0), worker, QUEUES, settings, models=models)
    made.register(default=default)
    return made


def ids(claimed: list[Claimed]) -> list[str]:
    return [decode(task.payload).id for task in claimed]


def done(task: Claimed, value: Any = 1) -> Final:
    task_id = decode(task.payload).id
    return Final(task.seq, task_id, results.success(task_id, value, worker="w"))


def begin(store: Store, tasks: list[Claimed]) -> set[int]:
    return store.begin(
        [(t.seq, decode(t.payload).id, results.started(decode(t.payload).id, "w", 1)) for t in tasks]
    )


def message(model: str | None = None, queue: str = "realtime") -> bytes:
    """Return a message such as a plain producer appends to a list by itself."""
    return Submission(task=PREDICT, inputs=[1], queue=queue, model=model).encode()


def send(
    store: Store, count: int = 1, *, model: str = "digits", caller: str = "", queue: str = "realtime"
) -> list[str]:
    """Submit tasks of a caller, which our clients have no word for yet; return their ids."""
    tasks = [
        Submission(task=PREDICT, inputs=[1], queue=queue, model=model, caller=caller) for _ in range(count)
    ]
    for call in bulk(tasks, QueueSettings()):
        bind(store.client, "submit")(args=call.args)
    return [task.id for task in tasks]


def commands(store: Store, *names: str) -> int:
    """Return how many commands Redis has run since the last call; with names, how many of those."""
    found = store.client.info("commandstats")
    store.client.config_resetstat()
    ours = {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in found.items()}
    counted = names or set(ours) - {"info", "config|resetstat", "config"}
    return sum(int(ours.get(name, 0)) for name in counted)


def calls(store: Store, act: Callable[[], object]) -> int:
    """Return how many calls of a script ``act`` makes."""
    store.client.config_resetstat()
    act()
    return commands(store, "evalsha")
