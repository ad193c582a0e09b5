# SPDX-License-Identifier: Apache-2.0
"""Messages that end the process which reads or runs them: on whose account, and how many workers it costs.

A process is a batcher here, and its death an exception that nothing catches: what it held stays in flight.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.models.loader import load
from gpuinfer.models.repository import Repository
from gpuinfer.queue import bodies, keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import PREDICT, Envelope, decode
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.worker import holdings
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import Engine
from gpuinfer.worker.sizes import Sizes
from tests.batchers import Line
from tests.models_for_tests import picky
from tests.services import RedisServer
from tests.unit.test_engine import Small

pytestmark = pytest.mark.integration

KILLS_ITS_READER = "kills its reader"
#: A pass with this input never ends.
KILLS_ITS_RUNNER = 666.0


class Died(BaseException):
    """The process has been killed."""


class Worker:
    """One name, under which one process after another lives."""

    def __init__(self, model: Small, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.client = connect(settings.broker, retries=0)
        self.deaths = 0
        self._killed = threading.Event()
        self._ends: list[Callable[[], None]] = []
        self.start()

    def start(self) -> None:
        """Begin a life: put back what the last one has left, as a worker does."""
        self.store = Store(self.client, "gpu0@here", QUEUES, self.settings.queue, models=("picky",))
        self.store.register(default="picky")
        self.store.restore()
        self._killed = killed = threading.Event()
        ended = threading.Event()

        def run(items: Any) -> bool:
            if any(KILLS_ITS_RUNNER in values for item in items for values in item):
                killed.set()
                ended.wait(60)
            return False

        self.model.too_much = run
        deadline = Deadline(lambda: None)
        engine = Engine({"picky": self.model}, Sizes({"picky": 64}), deadline, lambda: None)  # type: ignore[dict-item]
        self._ends += [ended.set, engine.close, deadline.close]
        manifests = {"picky": self.model.manifest}
        state = CeleryState("gpu0@here")
        self.batcher = Batcher(self.store, engine, manifests, self.settings, "cpu", state, lambda _: None)
        self.line = self.batcher.channel = Line(self.batcher)  # type: ignore[assignment]

    def work(self, until: Callable[[], object], timeout: float = 60.0) -> None:
        """Do what the event loop does, in as many lives as it takes."""
        end = time.monotonic() + timeout
        while not until():
            assert time.monotonic() < end
            try:
                self.line.claim()
                self.batcher.tick()
                if self._killed.wait(0.002):
                    raise Died
            except Died:
                self.deaths += 1
                self.start()

    def close(self) -> None:
        for end in self._ends:
            end()


@pytest.fixture
def worker(
    redis_server: RedisServer,
    settings_for: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Worker]:
    open_body = bodies.open_body

    def read(*args: Any) -> Any:
        found = open_body(*args)
        if KILLS_ITS_READER in str(found[0]):
            raise Died
        return found

    monkeypatch.setattr(bodies, "open_body", read)
    picky(tmp_path / "picky")
    made = Worker(Small(load(Repository([tmp_path]).get("picky"), "cpu")), settings_for(redis_server))
    yield made
    made.close()


def send(worker: Worker, inputs: Any, *, compressed: bool = True, protocol: int = 2) -> str:
    """Append a message as a plain producer does; compressed as with Celery's ``compression="gzip"``."""
    task = Submission(task=PREDICT, inputs=inputs, queue="realtime", model="picky")
    raw = json.loads(task.encode())
    body, headers, properties = raw["body"], raw["headers"], raw["properties"]
    if protocol == 1:
        args, kwargs, _ = json.loads(body)
        body = json.dumps({"task": PREDICT, "id": task.id, "args": args, "kwargs": kwargs})
        raw["headers"] = headers = {}
    if compressed:
        body = b64encode(gzip.compress(body.encode())).decode()
        properties["body_encoding"], headers["compression"] = "base64", "application/x-gzip"
    worker.client.lpush("realtime", json.dumps(raw | {"body": body}))
    return task.id


def letters(worker: Worker) -> set[str]:
    found: Any = worker.client.hkeys(keys.DEAD)
    return {letter.decode() for letter in found}


@pytest.mark.parametrize(("compressed", "protocol", "lives"), [(True, 2, 2), (True, 1, 2), (False, 2, 3)])
def test_a_message_that_kills_its_reader(
    worker: Worker, client: Client, *, compressed: bool, protocol: int, lives: int
) -> None:
    """It is the only dead letter. What is compressed is on record when it is first read; what is not is
    suspected after the first death. Its neighbours have no death on their account."""
    worker.store.claim(1)  # begins the epoch
    few = [client.submit([float(n)], model="picky") for n in range(20)]
    bomb = send(worker, KILLS_ITS_READER, compressed=compressed, protocol=protocol)
    rest = [client.submit([float(n)], model="picky") for n in range(20)]
    worker.work(lambda: all(client.status(task).final for task in (*few, *rest)) and letters(worker))
    assert letters(worker) == {bomb}
    assert worker.deaths == lives
    assert {client.status(task).state for task in (*few, *rest)} == {"completed"}
    assert max(worker.model.sizes) > 1, "what was suspected is batched once it is read"


def test_bombs_of_both_kinds_and_innocents(worker: Worker, client: Client) -> None:
    """Some are read while neighbours of others run: each bomb costs two lives, and each innocent succeeds."""
    innocents, bombs = [], []
    for n in range(120):
        innocents.append(client.submit([float(n)], model="picky"))
        if n % 40 == 13:
            bombs.append(send(worker, KILLS_ITS_READER))
        if n % 40 == 33:
            bombs.append(client.submit([KILLS_ITS_RUNNER], model="picky"))
    worker.work(lambda: all(client.status(task).final for task in innocents) and len(letters(worker)) == 6)
    assert letters(worker) == set(bombs)
    assert worker.deaths <= 2 * len(bombs)
    assert {client.status(task).state for task in innocents} == {"completed"}


def test_to_be_in_flight_costs_nothing(worker: Worker, client: Client) -> None:
    """26 deaths of others: what was merely in flight runs in the end, in a batch like any other."""
    tasks = client.submit_many([[float(n)] for n in range(8)], model="picky")
    for _ in range(26):
        assert len(worker.store.claim(100)) == 8
        worker.store.restore()
    worker.work(lambda: all(client.status(task).final for task in tasks))
    assert {client.status(task).state for task in tasks} == {"completed"}
    assert worker.model.sizes == [8]


def test_a_suspect_is_read_while_nothing_runs(worker: Worker, client: Client) -> None:
    """A death is charged to what runs and to what is read; it must not be known of both. Until then the
    suspect is held, and nothing else is claimed."""
    task = client.submit([1.0], model="picky")
    assert worker.store.claim(1)
    worker.start()
    go_on = threading.Event()
    worker.model.watch = lambda: go_on.wait(60)
    (suspect,) = worker.store.claim(1)
    assert decode(suspect.payload).deliveries == 1
    first = client.submit([2.0], model="picky")
    worker.line.claim()
    batcher = worker.batcher
    running = batcher.engine.current
    assert running is not None
    batcher.receive(worker.line, [suspect])  # type: ignore[arg-type]
    assert batcher.held() == {running.tasks[0].seq, suspect.seq}
    assert batcher.wants() == {}
    record = worker.client.hget(worker.store.inflight, "running")
    assert record == str(running.tasks[0].seq).encode()
    go_on.set()
    worker.work(lambda: client.status(task).final)
    assert client.status(first).state == client.status(task).state == "completed"
    assert not worker.client.exists(worker.store.inflight)


def test_nothing_is_read_beside_a_task_with_a_death(worker: Worker, client: Client) -> None:
    """Its second death is its last one, and must be its own doing; when it has run, it is off the record
    before anything else is read."""
    task = client.submit([1.0], model="picky")
    (claimed,) = worker.store.claim(1)
    worker.store.note([claimed.seq])
    worker.start()
    go_on = threading.Event()
    worker.model.watch = lambda: go_on.wait(60)
    worker.line.claim()
    batcher = worker.batcher
    assert batcher.engine.current is not None
    assert batcher.engine.current.tasks[0].envelope.deaths == 1
    bomb = send(worker, KILLS_ITS_READER, compressed=False)
    unread = worker.store.claim(1, search=True)
    assert len(unread) == 1
    batcher.receive(worker.line, unread)  # type: ignore[arg-type]  # on its way when the batch began
    go_on.set()
    worker.work(lambda: letters(worker) and client.status(task).final)
    assert letters(worker) == {bomb}
    assert client.status(task).state == "completed"


def test_what_is_read_is_on_record_alone(
    worker: Worker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each suspect is on record by itself while it is read, and none of them any more when it has been."""
    client.submit_many([[float(n)] for n in range(3)], model="picky")
    worker.store.claim(3)
    worker.start()
    seen: list[Any] = []
    body = Envelope.body

    def look(envelope: Envelope, *args: Any) -> Any:
        seen.append(worker.client.hget(worker.store.inflight, "running"))
        return body(envelope, *args)

    monkeypatch.setattr(Envelope, "body", look)
    batcher = worker.batcher
    batcher.engine.probing = True  # nothing begins
    claims = worker.store.claim(3)
    batcher.receive(worker.line, claims)  # type: ignore[arg-type]
    assert seen == [str(claim.seq).encode() for claim in claims]
    assert not worker.client.hexists(worker.store.inflight, "running")
    assert [claim.payload for claim in claims] == [b""] * 3, "the text is not kept"
    batcher.engine.probing = False


def test_unpacked_arguments_are_bounded(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What unpacks to more than a worker may hold is read as far as there is room; the rest goes back."""
    monkeypatch.setattr(holdings, "BUFFER_BYTES", 2_500_000)
    batcher = worker.batcher
    batcher.engine.probing = True  # nothing begins
    for _ in range(64):
        send(worker, [1.0] * 250_000)  # 1,000,000 bytes, and 1.5 KB in the list
    claims = worker.store.claim(64, search=True)
    assert len(claims) == 64
    batcher.receive(worker.line, claims)  # type: ignore[arg-type]
    assert len(batcher.held()) <= 3
    assert worker.client.llen("realtime") >= 61
    assert not worker.client.hexists(worker.store.inflight, "running")
    (again,) = worker.store.claim(1)
    assert decode(again.payload).deliveries == 0
    batcher.engine.probing = False
