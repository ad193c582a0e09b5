# SPDX-License-Identifier: Apache-2.0
"""Stock Celery in the kill test: two workers with a task that does nothing; its own keys are asked."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpuinfer.queue import keys
from tests.faults.account import Account, Sent
from tests.services import Process, RedisServer
from tests.workers import UNTRACED

#: The producer pauses while this many tasks wait.
BACKLOG = 400
DRAIN_TIMEOUT_S = 120.0


class StockWorld:
    """Asks of stock Celery what the kill test asks of ours, as far as it has an answer."""

    slots = 2

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        os.environ["STOCK_SOCKET"] = str(redis.socket)
        from tests.faults import stock

        url = f"redis+socket://{redis.socket}"
        self._app = stock.app
        self._app.conf.update(broker_url=url, result_backend=url)
        self._task = stock.double
        self._redis = redis
        self._folder = folder
        self._processes: dict[int, Process] = {}
        self._started = 0

    @property
    def producers(self) -> Sequence[Callable[[random.Random], list[Sent]]]:
        """What sends work, each for a thread of its own."""
        return (self._produce,)

    def spawn(self, slot: int) -> None:
        """Start the worker of a slot."""
        options = ["--pool=solo", "-n", f"s{slot}@%h", "-l", "INFO"]
        celery = str(Path(sys.executable).with_name("celery"))
        command = [*UNTRACED, celery, "-A", "tests.faults.stock", "worker", *options]
        log = self._folder / f"stock{self._started}.log"
        self._started += 1
        environment = os.environ | {"STOCK_SOCKET": str(self._redis.socket)}
        self._processes[slot] = Process(command, log, env=environment)

    def ready(self, slot: int) -> None:
        """Wait until the worker of a slot serves."""
        self._processes[slot].wait_for_line(r"ready\.")

    def kill(self, slot: int, number: signal.Signals, *, returns: bool = True) -> bool:
        """End the worker of a slot."""
        del returns  # its names say nothing of where its tasks lie
        self._processes[slot].send(number)
        self._processes[slot].wait(60)
        return True

    def give_back(self) -> None:
        """Nothing lies under a name; stock Celery itself puts back what is old, after an hour."""

    def tend(self) -> None:
        """None of them dies by itself."""

    def bomb(self, kind: str) -> Sent | None:
        """There is none: stock Celery has no dead letters."""
        del kind
        return None

    def _produce(self, dice: random.Random) -> list[Sent]:
        if self._waiting() > BACKLOG:
            time.sleep(0.01)
            return []
        ids = [self._task.delay(1.0).id for _ in range(dice.randint(1, 50))]
        return [Sent(id=task, model="double", by="delay()") for task in ids]

    def _waiting(self) -> int:
        return int(self._redis.client().llen("celery"))

    def lost_some(self, sent: Sequence[Sent]) -> bool:
        """Tell whether some of what is neither waiting nor held is gone already."""
        until = time.monotonic() + 10
        while self._waiting() and time.monotonic() < until:
            time.sleep(0.05)
        return bool(self.account(sent[: max(0, len(sent) - BACKLOG)]).lost)

    def finish(self) -> None:
        """Drain."""
        until = time.monotonic() + DRAIN_TIMEOUT_S
        while self._waiting() and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)  # the last one's result

    def account(self, sent: Sequence[Sent]) -> Account:
        """Look up every task. What a dead worker holds would come back after an hour: it is not lost."""
        raw = self._redis.client()
        unacked: Any = raw.hvals("unacked")
        held = b" ".join(unacked)
        ids = [task.id for task in sent]
        ended = {task for task in ids if b'"SUCCESS"' in (raw.get(keys.result(task)) or b"")}
        return Account(
            accepted=len(ids),
            completed=len(ended),
            lost=tuple(task for task in ids if task not in ended and task.encode() not in held),
            unexpected=(),
        )

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
