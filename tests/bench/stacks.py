# SPDX-License-Identifier: Apache-2.0
"""The two worlds side by side: each a Redis of its own, one worker on a core of its own, one client.

Both get the same redis-server with the same options (nothing on disk), the same model file and the
same inputs, and keep every result. Redis and the client run on one core, the worker on the other.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import orjson

from gpuinfer.client.sync import Client
from gpuinfer.queue import keys
from gpuinfer.settings import BrokerSettings, Settings
from gpuinfer.worker.cli import node_name
from tests.bench.baseline import Tuning, create_app
from tests.bench.machine import WORKER_CORE, cpu_seconds, pinned, unpinned
from tests.services import Process, RedisServer, ServiceError
from tests.workers import Workers

_ROOT = Path(__file__).resolve().parents[2]
#: How long a backlog may stand still before the run is given up.
STALL_S = 60.0
#: What each Redis is started with, beside what tests have: nothing is kept on disk, unless this says so.
REDIS: dict[str, str | int] = {}


class World(ABC):
    """One way to serve a model. A context manager; nothing it starts outlives it."""

    name: ClassVar[str]
    #: The list a task waits in.
    queue: ClassVar[str]

    def __init__(self, folder: Path, model: str = "perceptron") -> None:
        """``folder/models`` holds the models; logs go to ``folder``."""
        self.folder = folder
        self.model = model
        self.redis = RedisServer(None, **REDIS)
        self.raw = self.redis.client()
        self._worker: Process | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker, then Redis."""
        if self._worker is not None:
            self._worker.kill()
        self.disconnect()
        self.raw.close()
        self.redis.close()

    @property
    def worker(self) -> Process:
        if self._worker is None:
            raise ServiceError("the worker was not started")
        return self._worker

    def start(self, *, ready: bool = True) -> Process:
        """Start the worker, pinned to its core, and wait until it serves."""
        with pinned(WORKER_CORE):
            self._worker = self._spawn()
        if ready:
            self._wait_ready(self._worker)
        return self._worker

    @abstractmethod
    def _spawn(self) -> Process:
        """Start the worker process."""

    @abstractmethod
    def _wait_ready(self, worker: Process) -> None:
        """Return when the worker serves."""

    @abstractmethod
    def disconnect(self) -> None:
        """Close the client's connections."""

    @abstractmethod
    def submit(self, value: Any) -> object:
        """Submit one input as the client's users do; return whatever ``wait`` takes."""

    @abstractmethod
    def submit_all(self, values: Sequence[Any]) -> list[str]:
        """Submit many inputs in the fastest way the client offers; return their ids."""

    @abstractmethod
    def wait(self, ticket: Any) -> Any:
        """Wait for a submitted task and return its result."""

    @abstractmethod
    def held(self) -> int:
        """Return how many tasks the worker has taken and not finished; more than 0 is all that counts."""

    # -- backlogs -------------------------------------------------------------------------

    def waiting(self) -> int:
        """Return how many tasks no worker has taken."""
        return int(self.raw.llen(self.queue))

    def drain(self, ids: Sequence[str], *, poll_s: float = 0.005) -> tuple[float, float]:
        """Wait until a backlog is worked off; return the seconds when it began and when it ended.

        It begins when the queue gets shorter and ends when nothing waits and nothing is held. Raises
        ServiceError when a task failed, or nothing moves for STALL_S; both show the worker's log.
        """
        full = len(ids)
        began, left, moved = 0.0, full, time.perf_counter()
        while left or self.held():
            now, left = time.perf_counter(), self.waiting()
            if left < full:
                began, full, moved = began or now, left, now
            if not self.worker.running or now - moved > STALL_S:
                raise ServiceError(f"{self.name}: {left} tasks are left\n{self.worker.tail()}")
            time.sleep(poll_s)
        ended = time.perf_counter()
        time.sleep(0.05)  # stock Celery's last task may for a moment stand in neither place
        self._check(ids)
        return began, ended

    def _check(self, ids: Sequence[str]) -> None:
        """Read all results; raise ServiceError unless every one is a success."""
        for start in range(0, len(ids), 1000):
            found: Any = self.raw.mget([keys.result(task_id) for task_id in ids[start : start + 1000]])
            for meta in found:
                if meta is None or orjson.loads(meta)["status"] != "SUCCESS":
                    raise ServiceError(f"{self.name}: no success but {meta!r:.500}\n{self.worker.tail()}")

    def forget(self, ids: Sequence[str]) -> None:
        """Drop results that were read."""
        for start in range(0, len(ids), 1000):
            self.raw.unlink(*(keys.result(task_id) for task_id in ids[start : start + 1000]))


class Ours(World):
    """gpuinfer: its worker process, its client."""

    name = "gpuinfer"
    queue = "realtime"

    def __init__(self, folder: Path, model: str = "perceptron") -> None:
        super().__init__(folder, model)
        self._workers = Workers(self.redis, folder)
        self._inflight = keys.inflight(node_name(0))
        self.client = Client(Settings(broker=BrokerSettings(url=self.redis.url)))

    def _spawn(self) -> Process:
        return self._workers.start(0, ready=False, worker_models=self.model)

    def _wait_ready(self, worker: Process) -> None:
        worker.wait_for_line('"worker_ready"')

    def disconnect(self) -> None:
        self.client.close()

    def submit(self, value: Any) -> str:
        return self.client.submit(value)

    def submit_all(self, values: Sequence[Any]) -> list[str]:
        return self.client.submit_many(values)

    def wait(self, ticket: str) -> Any:
        return self.client.result(ticket, timeout_s=30)

    def held(self) -> int:
        return int(self.raw.exists(self._inflight))


class Fleet(Ours):
    """Several workers of ours and their Redis on all cores, as the kernel likes; the client keeps its own.

    ``sleep_s``: the model sleeps so long an item, and then runs.
    """

    def __init__(
        self, folder: Path, model: str = "perceptron", *, workers: int, sleep_s: float | None = None
    ) -> None:
        with unpinned():
            super().__init__(folder, model)
        self._count = workers
        self._sleep_s = sleep_s
        self.workers: list[Process] = []

    def _spawn(self) -> Process:
        program, settings = "gpuinfer", {"worker_models": self.model}
        if self._sleep_s is not None:
            program = "tests.bench.sleeping"
        sleeping = ["env", f"BENCH_SLEEP_S={self._sleep_s}"]
        self.workers = []
        with unpinned():
            for number in range(self._count):
                name = f"worker{number}"
                (self.folder / f"{name}.log").unlink(missing_ok=True)  # an older one says "ready"
                command = (*sleeping, sys.executable, "-m", program, "worker", str(number))
                self.workers.append(self._workers.spawn(*command, name=name, **settings))
        return self.workers[0]

    def _wait_ready(self, worker: Process) -> None:
        for each in self.workers:
            each.wait_for_line('"worker_ready"')

    def cpu_seconds(self) -> dict[str, float]:
        """Return the processor time used so far by the workers together, and by Redis."""
        return {
            "workers": sum(cpu_seconds(worker.pid) for worker in self.workers),
            "Redis": cpu_seconds(self.redis.pid),
        }

    def held(self) -> int:
        return int(self.raw.exists(*(keys.inflight(node_name(n)) for n in range(self._count))))

    @contextmanager
    def behind_a_gate(self, values: Sequence[Any]) -> Iterator[list[str]]:
        """Submit a backlog that no worker sees until the end of the block; all may start in it."""
        ids = self.submit_all(values)
        self.raw.rename(self.queue, "gate")
        yield ids
        self.raw.rename("gate", self.queue)
        ids.append(self.submit(values[0]))  # tells the workers

    def close(self) -> None:
        self._workers.close()
        super().close()


class Stock(World):
    """Stock Celery: a ``celery worker`` process on ``baseline.py``, and ``delay()``."""

    name = "stock Celery"
    queue = "celery"

    def __init__(self, folder: Path, model: str = "perceptron", tuning: Tuning | None = None) -> None:
        super().__init__(folder, model)
        self._tuning = tuning
        self.app = create_app(str(self.redis.socket), tuning)
        self.task = self.app.tasks["predict"]

    def _spawn(self) -> Process:
        # As tutorials start it; ours logs at INFO, too.
        options: tuple[str, ...] = ("--pool=solo", "--loglevel=INFO")
        tuning = self._tuning
        if tuning is not None:
            quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
            options = (f"--pool={tuning.pool}", "--concurrency=1", "--loglevel=WARNING", *quiet)
        environment = os.environ | {
            "BENCH_REDIS": str(self.redis.socket),
            "BENCH_MODEL": str(self.folder / "models" / self.model / "model.pt"),
            **({} if tuning is None else tuning.variables),
        }
        log = self.folder / "stock.log"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "celery", "-A", "tests.bench.baseline", "worker", *options]
        return Process(command, log, env=environment, cwd=_ROOT)

    def _wait_ready(self, worker: Process) -> None:
        """Wait until a control command is answered: the log's words may change."""
        until = time.monotonic() + 60
        while not self.app.control.ping(timeout=0.5):
            if not worker.running or time.monotonic() > until:
                raise ServiceError(f"{self.name} does not start\n{worker.tail()}")

    def disconnect(self) -> None:
        self.app.close()

    def submit(self, value: Any) -> Any:
        return self.task.delay(value)

    def submit_all(self, values: Sequence[Any]) -> list[str]:
        return [self.task.delay(value).id for value in values]

    def wait(self, ticket: Any) -> Any:
        return ticket.get(timeout=30)

    def held(self) -> int:
        return int(self.raw.hlen("unacked"))
