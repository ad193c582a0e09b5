# SPDX-License-Identifier: Apache-2.0
"""Kill workers while producers go on, then account for every id.

By hand: ``python -m tests.faults.kill --minutes 10``.

Two workers, each killed at a random moment and started again as a unit would be. In the end all
must drain; then each accepted id is looked up, and the workers' logs tell which ran twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from gpuinfer import Client
from gpuinfer.errors import BrokerUnavailable
from gpuinfer.queue import keys
from tests.models_for_tests import perceptron
from tests.services import Process, RedisServer
from tests.workers import UNTRACED, Workers

#: Producers hold their breath while this many tasks wait.
BACKLOG = 400
DRAIN_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do: how many kills, or for how long, by which signal, to whom."""

    signal: str = "KILL"
    kills: int | None = 26
    seconds: float | None = None
    #: Kill stock Celery's workers instead, and stop at the first loss.
    stock: bool = False
    seed: int = field(default_factory=lambda: random.SystemRandom().randrange(10**6))


@dataclass(frozen=True, kw_only=True)
class Account:
    """Where every accepted task went."""

    kills: int
    accepted: int
    completed: int
    #: Accepted, and neither ended nor anywhere in Redis.
    lost: tuple[str, ...]
    #: Ended in another way than asked for.
    unexpected: tuple[str, ...]
    #: Executions beyond the first of an id.
    duplicates: int
    #: Ids that ran twice and whose result does not say so.
    unflagged: tuple[str, ...]


class World(Protocol):
    """What is killed: ours or stock Celery."""

    def start(self, number: int) -> Process: ...
    def submit(self, count: int) -> list[str]: ...
    def waiting(self) -> int: ...
    def account(self, ids: list[str]) -> Account: ...


class Ours:
    """gpuinfer workers with a small model and small batches, so that many claims are cut."""

    def __init__(self, redis: RedisServer, folder: Path, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        perceptron(folder / "models" / "mlp", max_batch_size=8)
        self._redis = redis
        self._client = Client(redis.url)
        self._workers = Workers(redis, folder)
        self._folder = folder
        self._starts = itertools.count()

    def start(self, number: int) -> Process:
        name = f"run{next(self._starts)}-{number}"
        process = self._workers.spawn(
            *(*UNTRACED, sys.executable, "-m", "gpuinfer", "worker", str(number)),
            name=name,
            worker_models="mlp",
            log_level="debug",
            queue_max_deaths=self._max_deaths,
        )
        process.wait_for_line('"worker_ready"')
        return process

    def submit(self, count: int) -> list[str]:
        return self._client.submit_many([[0.5] * 64] * count, model="mlp")

    def waiting(self) -> int:
        raw = self._redis.client()
        claimed = sum(raw.hlen(key) for key in raw.scan_iter(keys.INFLIGHT_PREFIX + "*"))
        return raw.llen("realtime") + claimed

    def account(self, ids: list[str]) -> Account:
        statuses = {task: _status(self._client, task) for task in ids}
        ran = Counter(
            task
            for log in self._folder.glob("run*.log")
            for task in {
                task
                for line in log.read_text().splitlines()
                if '"batch_begun"' in line
                for task in json.loads(line)["task_ids"]
            }
        )
        return Account(
            kills=0,
            accepted=len(ids),
            completed=sum(1 for s in statuses.values() if s is not None and s.state == "completed"),
            lost=tuple(task for task, s in statuses.items() if s is None or not s.final),
            unexpected=tuple(t for t, s in statuses.items() if s is not None and s.final and s.error),
            duplicates=sum(count - 1 for count in ran.values()),
            unflagged=tuple(
                task
                for task, count in ran.items()
                if count > 1 and not getattr(statuses[task], "redelivered", 0)
            ),
        )

    def close(self) -> None:
        self._workers.close()
        self._client.close()


def _status(client: Client, task: str) -> Any:
    from gpuinfer.errors import TaskNotFound

    try:
        return client.status(task)
    except TaskNotFound:
        return None


class Stock:
    """Stock Celery workers with a task that does nothing; the same questions, asked of its own keys."""

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        os.environ["STOCK_SOCKET"] = str(redis.socket)
        from tests.faults import stock

        url = f"redis+socket://{redis.socket}"
        self._app = stock.app
        self._app.conf.update(broker_url=url, result_backend=url)
        self._task = stock.double
        self._redis = redis
        self._folder = folder
        self._started: list[Process] = []

    def start(self, number: int) -> Process:
        celery = Path(sys.executable).with_name("celery")
        command = [
            *UNTRACED,
            str(celery),
            "-A",
            "tests.faults.stock",
            "worker",
            "--pool=solo",
            "-n",
            f"s{number}@%h",
            "-l",
            "INFO",
        ]
        log = self._folder / f"stock{len(self._started)}.log"
        process = Process(command, log, env=os.environ | {"STOCK_SOCKET": str(self._redis.socket)})
        self._started.append(process)
        process.wait_for_line(r"ready\.")
        return process

    def submit(self, count: int) -> list[str]:
        return [self._task.delay(1.0).id for _ in range(count)]

    def waiting(self) -> int:
        return self._redis.client().llen("celery")

    def account(self, ids: list[str]) -> Account:
        raw = self._redis.client()
        unacked: Any = raw.hvals("unacked")
        held = b" ".join(unacked)  # these would come back, after an hour
        ended = {task for task in ids if b'"SUCCESS"' in (raw.get(keys.result(task)) or b"")}
        lost = tuple(task for task in ids if task not in ended and task.encode() not in held)
        return Account(
            kills=0,
            accepted=len(ids),
            completed=len(ended),
            lost=lost,
            unexpected=(),
            duplicates=0,
            unflagged=(),
        )

    def close(self) -> None:
        for process in self._started:
            process.kill()


def run(plan: Plan, redis: RedisServer, folder: Path, say: Callable[[str], None] = print) -> Account:
    """Carry the plan out and return the account."""
    dice = random.Random(plan.seed)  # noqa: S311  # moments to kill at, not secrets
    say(f"seed {plan.seed}")
    # Who is killed this often takes innocents to two deaths; who is only stopped must not count any.
    max_deaths = 10 if plan.signal == "KILL" else 2
    world = Stock(redis, folder) if plan.stock else Ours(redis, folder, max_deaths)
    try:
        accepted, kills = _under_fire(plan, world, dice, say)
        _drain(world)
        return replace(world.account(accepted), kills=kills)
    finally:
        world.close()


def _under_fire(
    plan: Plan, world: Any, dice: random.Random, say: Callable[[str], None]
) -> tuple[list[str], int]:
    accepted: list[str] = []
    over = threading.Event()
    producer = threading.Thread(target=_produce, args=(world, accepted, over), daemon=True)
    victims = [world.start(0), world.start(1)]
    producer.start()
    begun, kills = time.monotonic(), 0
    try:
        while not _enough(plan, kills, time.monotonic() - begun):
            number = dice.randrange(2)
            time.sleep(dice.uniform(0.02, 0.3))
            victims[number].send(signal.Signals[f"SIG{plan.signal}"])
            victims[number].wait()
            kills += 1
            if plan.stock and kills % 5 == 0 and _lost_some(world, accepted):
                break
            if kills % 10 == 0:
                say(f"{kills} kills, {len(accepted)} tasks accepted")
            victims[number] = world.start(number)
    finally:
        over.set()
        producer.join(timeout=30)
    for number in (0, 1):  # one may be dead just now
        if not victims[number].running:
            world.start(number)
    return accepted, kills


def _lost_some(world: Any, accepted: list[str]) -> bool:
    """Tell whether some of what is neither waiting nor held is gone already."""
    until = time.monotonic() + 10
    while world.waiting() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(world.account(accepted[: max(0, len(accepted) - BACKLOG)]).lost)


def _enough(plan: Plan, kills: int, seconds: float) -> bool:
    if plan.kills is not None and kills >= plan.kills:
        return True
    return plan.seconds is not None and seconds >= plan.seconds


def _produce(world: Any, accepted: list[str], over: threading.Event) -> None:
    while not over.is_set():
        if world.waiting() > BACKLOG:
            time.sleep(0.01)
            continue
        try:
            accepted += world.submit(50)
        except BrokerUnavailable:
            time.sleep(0.1)


def _drain(world: Any) -> None:
    until = time.monotonic() + DRAIN_TIMEOUT_S
    while world.waiting():
        if time.monotonic() > until:
            return  # the account will say what is left
        time.sleep(0.1)
    time.sleep(0.5)  # the last one's result


def main() -> int:
    """Run a plan from the command line and print the account; exit 1 when something was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="how long (default: 26 kills)")
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument(
        "--stock", action="store_true", help="kill stock Celery instead, until it has lost a task"
    )
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    seconds = options.minutes * 60 if options.minutes else None
    plan = Plan(signal=options.signal, kills=None if seconds else 26, seconds=seconds, stock=options.stock)
    if options.seed is not None:
        plan = replace(plan, seed=options.seed)
    redis = RedisServer()
    try:
        with tempfile.TemporaryDirectory(prefix="gi-kill-") as folder:
            account = run(plan, redis, Path(folder))
    finally:
        redis.close()
    for name, value in vars(account).items():
        print(f"{name:11} {len(value) if isinstance(value, tuple) else value}")
    return 1 if account.lost or account.unexpected or account.unflagged else 0


if __name__ == "__main__":
    sys.exit(main())
