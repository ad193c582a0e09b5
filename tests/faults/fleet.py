# SPDX-License-Identifier: Apache-2.0
"""What the kill test kills: a fleet whose workers serve different models, and what sends it work.

    slot 0: alpha, beta     slot 1: beta     slot 2: gamma

A slot's worker that is killed comes back under its own name, or never; then a new name takes its slot.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from celery import Celery
from torch import Tensor, nn

from gpuinfer import Client
from gpuinfer.queue import depth, keys
from gpuinfer.queue.message import PREDICT
from gpuinfer.queue.results import TaskStatus, parse
from gpuinfer.settings import QUEUES, QueueSettings
from tests.faults.account import Account, Sent, rows
from tests.models_for_tests import perceptron, write_model
from tests.services import Process, RedisServer
from tests.workers import UNTRACED, Workers

#: Slot -> the models its worker serves.
SLOTS = (("alpha", "beta"), ("beta",), ("gamma",))
DEFAULT = "alpha"
#: Producers pause while this many tasks of a model wait.
BACKLOG = {"alpha": 300, "beta": 300, "gamma": 80}
INPUTS: dict[str, list[float]] = {"alpha": [0.5] * 64, "beta": [0.5] * 64, "gamma": [1.0]}
#: Runs for longer than any test: whoever runs it is killed.
POISON = [-1.0]
DRAIN_TIMEOUT_S = 120.0


class _Gamma(nn.Module):
    """30 ms a batch: longer than what a worker claims behind. Negative: stuck."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x != 0).any()):
            last_ns = 600_000_000_000 if bool((x < 0).any()) else 30_000_000
            begin = torch.ops.prim.TimePoint()
            while torch.ops.prim.TimePoint() - begin < last_ns:
                x = x + 0.0
        return x * 2


def _write_models(folder: Path) -> None:
    perceptron(folder / "alpha", max_batch_size=8)
    perceptron(folder / "beta", max_batch_size=16)
    tables = """
max_batch_size = 4
soft_time_limit_s = 500
hard_time_limit_s = 600
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "twice"
"""
    write_model(folder / "gamma", _Gamma(), tables)


@dataclass(slots=True)
class _Slot:
    number: int
    process: Process | None = None

    @property
    def name(self) -> str:
        return f"gpu{self.number}@{socket.gethostname()}"


class Fleet:
    """gpuinfer workers with small batches, so that many claims are cut; our client and plain Celery."""

    slots = len(SLOTS)

    def __init__(self, redis: RedisServer, folder: Path, max_deaths: int) -> None:
        _write_models(folder / "models")
        self._queue = QueueSettings(max_deaths=max_deaths)
        self._folder = folder
        self._raw = redis.client()
        self._raw.set(keys.DEFAULT_MODEL, DEFAULT)  # else it is the first model of whoever is ready first
        self._client = Client(redis.url)
        url = f"redis+socket://{redis.socket}"
        self._stranger = Celery("stranger", broker=url, backend=url, set_as_current=False)
        self._workers = Workers(redis, folder)
        self._slots = [_Slot(number) for number in range(self.slots)]
        self._numbers, self._starts = itertools.count(self.slots), itertools.count()
        #: Names that are gone for good, and those among them whose tasks lie where they are.
        self._gone: list[str] = []
        self._orphaned: list[str] = []
        self._put_back = 0

    @property
    def producers(self) -> Sequence[Callable[[random.Random], list[Sent]]]:
        """What sends work, each for a thread of its own; nothing while enough waits."""
        return self.submit, self.send

    # -- workers --------------------------------------------------------------------------

    def spawn(self, slot: int) -> None:
        """Start the worker of a slot."""
        place = self._slots[slot]
        place.process = self._workers.spawn(
            *(*UNTRACED, sys.executable, "-m", "gpuinfer", "worker", str(place.number)),
            name=f"run{next(self._starts)}-{place.number}",
            worker_models=",".join(SLOTS[slot]),
            log_level="debug",
            queue_max_deaths=self._queue.max_deaths,
        )

    def ready(self, slot: int) -> None:
        """Wait until the worker of a slot serves."""
        self._process(slot).wait_for_line('"worker_ready"', timeout=90)

    def _process(self, slot: int) -> Process:
        process = self._slots[slot].process
        if process is None:
            raise RuntimeError(f"slot {slot} has never been started")
        return process

    def kill(self, slot: int, number: signal.Signals, *, returns: bool = True) -> None:
        """End the worker of a slot. ``returns=False``: its name never comes back."""
        process, place = self._process(slot), self._slots[slot]
        process.send(number)
        process.wait(60)
        if not returns:
            self._gone.append(place.name)
            self._orphaned.append(place.name)
            place.number = next(self._numbers)

    def give_back(self) -> None:
        """Put back what lies under names that do not come back, as an operator does."""
        while self._orphaned:
            name = self._orphaned.pop()
            command = [sys.executable, "-m", "gpuinfer", "restore", "--name", name, "--force", "--json"]
            environment = self._workers.environment(queue_max_deaths=self._queue.max_deaths)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(
                    f"gpuinfer restore --name {name} ended with {done.returncode}: {done.stderr}"
                )
            self._put_back += json.loads(done.stdout)["returned"]

    # -- producers ------------------------------------------------------------------------

    def submit(self, dice: random.Random) -> list[Sent]:
        """Submit by our client: many inputs, or a list job, for any model, in any queue and priority."""
        model = self._hungry(dice)
        if model is None:
            return []
        options: dict[str, Any] = {"queue": dice.choice(QUEUES), "priority": dice.choice((0, 0, 4, 9))}
        if dice.random() < 0.1:
            job = self._client.submit_batch([INPUTS[model]] * dice.randint(1, 30), model=model, **options)
            return [Sent(id=job, model=model, by="our client, list job")]
        if model != DEFAULT or dice.random() < 0.5:
            options["model"] = model
        ids = self._client.submit_many([INPUTS[model]] * dice.randint(1, 50), **options)
        return [Sent(id=task, model=model, by="our client") for task in ids]

    def send(self, dice: random.Random) -> list[Sent]:
        """Send by plain Celery: into a base queue for whichever model, or into the model's queue."""
        model = self._hungry(dice)
        if model is None:
            return []
        queue, priority = str(dice.choice(QUEUES)), dice.choice((None, 3, 9))
        base = dice.random() < 0.6
        if model == DEFAULT:
            by, kwargs = "Celery, base queue, no model", {}
        elif base:
            by, kwargs = "Celery, base queue, model named", {"model": model}
        else:
            by, kwargs, queue = "Celery, queue of the model", {"model": model}, keys.queue_name(queue, model)
        count = dice.randint(1, 20)
        return [
            Sent(
                id=self._stranger.send_task(
                    PREDICT, [INPUTS[model]], kwargs, queue=queue, priority=priority
                ).id,
                model=model,
                by=by,
            )
            for _ in range(count)
        ]

    def poison(self) -> Sent:
        """Submit a task that its worker does not survive."""
        task = self._client.submit(POISON, model="gamma")
        return Sent(id=task, model="gamma", by="our client, poison", poison=True)

    def _hungry(self, dice: random.Random) -> str | None:
        """Choose a model of which there is not enough waiting."""
        waiting: Counter[str] = Counter()
        for lane, levels in depth.look(self._raw).lanes.items():
            waiting[lane.model or DEFAULT] += sum(levels.values())
        hungry = [model for model, most in BACKLOG.items() if waiting[model] < most]
        if not hungry:
            time.sleep(0.01)
            return None
        return dice.choice(hungry)

    # -- the end --------------------------------------------------------------------------

    def finish(self, sent: Sequence[Sent]) -> int:
        """Drain; kill whoever runs poison until it is given up. Returns how many had to be killed."""
        kills, until = 0, time.monotonic() + DRAIN_TIMEOUT_S
        poison = [task.id for task in sent if task.poison]
        while self._left() and time.monotonic() < until:  # the account says what is left
            if any(self._client.status(task).state == "running" for task in poison):
                slot = next(i for i, models in enumerate(SLOTS) if "gamma" in models)
                self.kill(slot, signal.SIGKILL)
                self.spawn(slot)
                self.ready(slot)
                kills, until = kills + 1, time.monotonic() + DRAIN_TIMEOUT_S
            time.sleep(0.05)
        return kills

    def _left(self) -> int:
        found = depth.look(self._raw)
        return found.total_waiting + found.total_inflight

    def account(self, sent: Sequence[Sent]) -> Account:
        """Look up every task, and count by the workers' logs how often each has run."""
        statuses = self._statuses([task.id for task in sent])
        ran = self._ran()
        letters: Any = self._raw.hkeys(keys.DEAD)
        dead = {letter.decode() for letter in letters}
        poison = {task.id for task in sent if task.poison}
        failed = {task for task, s in statuses.items() if s is not None and s.final and s.error}
        completed = {task for task, s in statuses.items() if s is not None and s.state == "completed"}
        lost = tuple(task for task, s in statuses.items() if s is None or not s.final)
        return Account(
            accepted=len(sent),
            completed=len(completed),
            lost=lost,
            unexpected=tuple((failed - poison) | (poison - dead)),
            reasons=_reasons(statuses[task] for task in failed - poison),
            stray=tuple(dead - poison),
            duplicates=sum(count - 1 for count in ran.values()),
            unflagged=tuple(
                task
                for task, count in ran.items()
                if count > 1 and task not in poison and not getattr(statuses[task], "redelivered", False)
            ),
            gone=tuple(self._gone),
            put_back=self._put_back,
            poison=len(poison & dead),
            rows=rows(sent, completed, lost, ran),
        )

    def _statuses(self, ids: Sequence[str]) -> dict[str, TaskStatus | None]:
        found: dict[str, TaskStatus | None] = {}
        for start in range(0, len(ids), 1000):
            some = ids[start : start + 1000]
            metas: Any = self._raw.mget([keys.result(task) for task in some])
            found |= {t: None if m is None else parse(t, m) for t, m in zip(some, metas, strict=True)}
        return found

    def _ran(self) -> Counter[str]:
        """Count in how many processes each task has begun."""
        ran: Counter[str] = Counter()
        for log in self._folder.glob("run*.log"):
            begun = [line for line in log.read_text().splitlines() if '"batch_begun"' in line]
            ran.update({task for line in begun for task in json.loads(line)["task_ids"]})
        return ran

    def close(self) -> None:
        self._workers.close()
        self._client.close()
        self._stranger.close()
        self._raw.close()


def _reasons(statuses: Iterable[TaskStatus | None]) -> tuple[str, ...]:
    """Return what errors say, with how often, the most frequent first."""
    texts = Counter(f"{type(s.error).__name__}: {s.error}" for s in statuses if s is not None)
    return tuple(f"{count:,} times {text}" for text, count in texts.most_common())
