# SPDX-License-Identifier: Apache-2.0
"""What the kill test kills: a fleet whose workers serve different models, and what sends it work.

    slot 0: alpha, beta     slot 1: beta     slot 2: gamma

A slot's worker that is killed comes back under its own name, or never; then a new name takes its slot. One
that dies of a bomb comes back at once.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery import Celery, chain

from gpuinfer import Client
from gpuinfer.queue import depth, keys
from gpuinfer.queue.message import PREDICT, decode
from gpuinfer.queue.results import TaskStatus, parse
from gpuinfer.settings import QUEUES
from tests.faults.account import Account, Sent, rows
from tests.faults.fragile import FATAL_BYTES, KILLS_ITS_READER, KILLS_ITS_RUNNER
from tests.models_for_tests import perceptron, python_model
from tests.services import Process, RedisServer, ServiceError, whole_lines
from tests.workers import UNTRACED, Workers, wait_until

#: Slot -> the models its worker serves.
SLOTS = (("alpha", "beta"), ("beta",), ("gamma",))
DEFAULT = "alpha"
#: Producers pause while this many tasks of a model wait.
BACKLOG = {"alpha": 300, "beta": 300, "gamma": 80}
INPUTS: dict[str, list[float]] = {"alpha": [0.5] * 64, "beta": [0.5] * 64, "gamma": [1.0]}
#: What ends its worker: to unpack it, to run it, to read it.
BOMBS = ("gzip", "run", "read")
#: How many workers it may take along. One that is not compressed is read for the first time as any other
#: message is; that death is on nobody's account.
LIVES = {"gzip": 2, "run": 2, "read": 3}
DRAIN_TIMEOUT_S = 120.0
#: Shares of what plain Celery sends.
COMPRESSED, LATER, CHAINED = 0.1, 0.2, 0.1
#: Where chains go on; nobody works there.
FOREIGN = "celery"
#: Begun, as restore.lua counts it.
_DEATHS = re.compile(rb'{"gpuinfer": \[\d+, (\d+)\]')


#: 30 ms a batch: longer than what a worker claims behind; and what is prepared and finished beside it.
_GAMMA = """
    import time


    class Gamma:
        example = [0.0]

        def prepare(self, item: list):
            time.sleep(0.003)
            return item[0]

        def predict(self, batch):
            time.sleep(0.03)
            return [2 * number for number in batch]

        def finish(self, out):
            return {"twice": out}
"""


def _write_models(folder: Path) -> None:
    perceptron(folder / "alpha", max_batch_size=8)
    perceptron(folder / "beta", max_batch_size=16)
    tables = "max_batch_size = 4\nsoft_time_limit_s = 500\nhard_time_limit_s = 600\n"
    python_model(folder / "gamma", _GAMMA, tables)


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

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        _write_models(folder / "models")
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
        self._put_back = self._bombed = 0
        self._bombs: dict[str, str] = {}

    @property
    def producers(self) -> Sequence[Callable[[random.Random], list[Sent]]]:
        """What sends work, each for a thread of its own; nothing while enough waits."""
        return self.submit, self.send

    # -- workers --------------------------------------------------------------------------

    def spawn(self, slot: int) -> None:
        """Start the worker of a slot."""
        place = self._slots[slot]
        place.process = self._workers.spawn(
            *(*UNTRACED, sys.executable, "-m", "tests.faults.fragile", "worker", str(place.number)),
            name=f"run{next(self._starts)}-{place.number}",
            worker_models=",".join(SLOTS[slot]),
            log_level="debug",
        )

    def ready(self, slot: int) -> None:
        """Wait until the worker of a slot serves; it may die of a bomb before it says so."""
        while True:
            process = self._process(slot)
            try:
                process.wait_for_line('"worker_ready"')
            except ServiceError:
                if process.returncode != -signal.SIGKILL:
                    raise
                self.tend()
            else:
                return

    def _process(self, slot: int) -> Process:
        process = self._slots[slot].process
        if process is None:
            raise RuntimeError(f"slot {slot} has never been started")
        return process

    def tend(self) -> None:
        """Start again whoever has died of a bomb, as systemd does."""
        for slot in range(self.slots):
            process = self._process(slot)
            if process.running:
                continue
            if process.returncode != -signal.SIGKILL:
                raise RuntimeError(f"a worker ended with {process.returncode}\n{process.tail()}")
            self._bombed += 1
            self.spawn(slot)

    def kill(self, slot: int, number: signal.Signals, *, returns: bool = True) -> bool:
        """End the worker of a slot. ``returns=False``: its name never comes back.

        Returns False when it had died of a bomb already.
        """
        process, place = self._process(slot), self._slots[slot]
        if number == signal.SIGKILL:
            self._stop(process, place.name)
        died = not process.running
        self._bombed += died
        process.send(number)
        process.wait(60)
        if not returns:
            self._gone.append(place.name)
            self._orphaned.append(place.name)
            place.number = next(self._numbers)
        return not died

    def _stop(self, process: Process, name: str) -> None:
        """Stop it at a moment at which a kill charges no innocent a second time."""
        while process.running:
            process.send(signal.SIGSTOP)
            wait_until(lambda: not process.running or _stopped(process.pid), 60)
            for _ in range(2):  # with the second answer Redis has read all that the worker had sent
                self._raw.ping()
            if not self._charged(name):
                return
            process.send(signal.SIGCONT)
            time.sleep(0.02)

    def _charged(self, name: str) -> bool:
        """Tell whether an innocent with a death on its account is on a worker's record."""
        inflight = keys.inflight(name)
        running: Any = self._raw.hget(inflight, "running") or b""
        for seq in running.split():
            payload: Any = self._raw.hget(inflight, seq.decode()) or b""
            deaths = _DEATHS.match(payload)
            bomb = any(task.encode() in payload for task in self._bombs)
            if deaths and int(deaths.group(1)) and not bomb:
                return True
        return False

    def give_back(self) -> None:
        """Put back what lies under names that do not come back, as an operator does."""
        while self._orphaned:
            name = self._orphaned.pop()
            command = [sys.executable, "-m", "gpuinfer", "restore", "--name", name, "--force", "--json"]
            environment = self._workers.environment()
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
        options: dict[str, Any] = {"queue": queue, "priority": priority}
        eta: float | None = None
        kind = dice.random()
        if kind > 1 - CHAINED:
            return self._chain(model, kwargs, options)
        if kind < LATER:
            eta = time.time() + dice.uniform(0.1, 4.0)
            options["eta"], by = datetime.fromtimestamp(eta, UTC), "Celery, with an ETA"
        elif kind < LATER + COMPRESSED:
            options["compression"], by = "gzip", "Celery, compressed"
        count = dice.randint(1, 20)
        ids = [self._send(INPUTS[model], kwargs, options) for _ in range(count)]
        return [Sent(id=task, model=model, by=by, eta=eta) for task in ids]

    def _chain(self, model: str, kwargs: dict[str, Any], options: dict[str, Any]) -> list[Sent]:
        """Send a prediction, which another one follows, of another model, and a task of somebody else's."""
        then = "beta" if model != "beta" else DEFAULT
        predict = self._stranger.signature(PREDICT, args=(INPUTS[model],), kwargs=kwargs, options=options)
        again = self._stranger.signature(
            PREDICT, args=(INPUTS[then],), kwargs={"model": then}, queue="default", immutable=True
        )
        store = self._stranger.signature("shop.store", queue=FOREIGN)
        last = chain(predict, again, store, app=self._stranger).apply_async()
        return [
            Sent(id=last.parent.parent.id, model=model, by="Celery, first of a chain"),
            Sent(id=last.parent.id, model=then, by="Celery, second of a chain", follower=last.id),
        ]

    def _send(self, inputs: Any, kwargs: dict[str, Any], options: dict[str, Any]) -> str:
        return str(self._stranger.send_task(PREDICT, [inputs], kwargs, **options).id)

    def bomb(self, kind: str) -> Sent:
        """Send a task that its workers do not survive: who unpacks it, reads it, or runs it."""
        model = "beta"
        options: dict[str, Any] = {"queue": keys.queue_name("realtime", model)}
        inputs: Any = {"read": KILLS_ITS_READER, "run": [KILLS_ITS_RUNNER] * 64}.get(kind)
        if kind == "gzip":  # 7 KB on the way
            inputs, options["compression"] = [0] * (FATAL_BYTES // 2), "gzip"
        task = self._send(inputs, {"model": model}, options)
        self._bombs[task] = kind
        return Sent(id=task, model=model, by=f"Celery, a bomb ({kind})", bomb=True)

    def _hungry(self, dice: random.Random) -> str | None:
        """Choose a model of which there is not enough waiting."""
        waiting: Counter[str] = Counter()
        for lane, levels in depth.read(self._raw).lanes.items():
            waiting[lane.model or DEFAULT] += sum(levels.values())
        hungry = [model for model, most in BACKLOG.items() if waiting[model] < most]
        if not hungry:
            time.sleep(0.01)
            return None
        return dice.choice(hungry)

    # -- the end --------------------------------------------------------------------------

    def finish(self) -> None:
        """Drain; the bombs that are left take their last workers along."""
        until = time.monotonic() + DRAIN_TIMEOUT_S
        while self._left() and time.monotonic() < until:  # the account says what is left
            self.tend()
            time.sleep(0.05)

    def _left(self) -> int:
        found = depth.read(self._raw)
        return found.total_waiting + found.total_later + found.total_inflight

    def account(self, sent: Sequence[Sent]) -> Account:
        """Look up every task, and count by the workers' logs how often each has run."""
        statuses = self._statuses([task.id for task in sent])
        ran, first = self._ran()
        letters: Any = self._raw.hkeys(keys.DEAD)
        dead = {letter.decode() for letter in letters}
        waiting: Any = self._raw.lrange(FOREIGN, 0, -1)
        followed = Counter(decode(payload).id for payload in waiting)
        followers = {task.follower for task in sent if task.follower}
        bombs = {task.id for task in sent if task.bomb}
        failed = {task for task, s in statuses.items() if s is not None and s.final and s.error}
        completed = {task for task, s in statuses.items() if s is not None and s.state == "completed"}
        lost = tuple(task for task, s in statuses.items() if s is None or not s.final)
        return Account(
            accepted=len(sent),
            completed=len(completed),
            lost=lost,
            unexpected=tuple((failed - bombs) | (bombs - dead)),
            reasons=_reasons(statuses[task] for task in failed - bombs),
            stray=tuple(dead - bombs),
            duplicates=sum(count - 1 for count in ran.values()),
            unflagged=tuple(
                task
                for task, count in ran.items()
                if count > 1 and task not in bombs and not getattr(statuses[task], "redelivered", False)
            ),
            followers=len(followed),
            not_followed=tuple(followers - set(followed)),
            followed_twice=tuple(task for task, count in followed.items() if count > 1),
            # The log's times are cut to milliseconds.
            early=tuple(
                task.id for task in sent if task.eta and first.get(task.id, task.eta) + 0.001 < task.eta
            ),
            bombed=self._bombed,
            gone=tuple(self._gone),
            put_back=self._put_back,
            bombs=len(bombs & dead),
            rows=rows(sent, completed, lost, ran),
        )

    def _statuses(self, ids: Sequence[str]) -> dict[str, TaskStatus | None]:
        found: dict[str, TaskStatus | None] = {}
        for start in range(0, len(ids), 1000):
            some = ids[start : start + 1000]
            metas: Any = self._raw.mget([keys.result(task) for task in some])
            found |= {t: None if m is None else parse(t, m) for t, m in zip(some, metas, strict=True)}
        return found

    def _ran(self) -> tuple[Counter[str], dict[str, float]]:
        """Count in how many processes each task has begun, and say when it began first."""
        ran: Counter[str] = Counter()
        first: dict[str, float] = {}
        for log in self._folder.glob("run*.log"):
            begun, here = [], set[str]()
            for text in whole_lines(log.read_text()):
                if '"batch_begun"' in text:
                    begun.append(json.loads(text))
                    here.update(begun[-1]["task_ids"])
                elif '"batch_withdrawn"' in text:
                    here.difference_update(json.loads(text)["task_ids"])
            ran.update(here)
            for line in begun:
                at = datetime.fromisoformat(line["timestamp"]).timestamp()
                first |= {task: min(at, first.get(task, at)) for task in line["task_ids"]}
        return ran, first

    def close(self) -> None:
        self._workers.close()
        self._client.close()
        self._stranger.close()
        self._raw.close()


def _reasons(statuses: Iterable[TaskStatus | None]) -> tuple[str, ...]:
    """Return what errors say, with how often, the most frequent first."""
    texts = Counter(f"{type(s.error).__name__}: {s.error}" for s in statuses if s is not None)
    return tuple(f"{count:,} times {text}" for text, count in texts.most_common())


def _stopped(pid: int) -> bool:
    """Tell whether a process is stopped; one that is gone is not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
