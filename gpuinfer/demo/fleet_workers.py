# SPDX-License-Identifier: Apache-2.0
"""Workers of a simulated fleet: real claims, results and heartbeats, and a sleep instead of a GPU.

A task's ``metadata`` may request a fault: with ``{"fault": "fail"}`` it fails, with ``{"fault": "kill"}`` it
kills its worker, like a SIGKILL.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Collection, Mapping, Sequence

import orjson
import redis

from gpuinfer import __version__
from gpuinfer.errors import InferenceError
from gpuinfer.log import get_logger
from gpuinfer.queue import results
from gpuinfer.queue.claims import Claimed, Final, label
from gpuinfer.queue.connection import connect
from gpuinfer.queue.drained import DRAINED
from gpuinfer.queue.keys import place_of
from gpuinfer.queue.message import Envelope, decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.watcher.state import UnitState, Verb
from gpuinfer.watcher.units import UnitView

log = get_logger(__name__)

FAULT = "fault"
#: Seconds that a start takes, and seconds before a restart after a crash.
STARTUP_S, RESTART_S = 1.0, 0.5
_BATCH, _IDLE_S, _BEAT_S = 8, 0.03, 1.0
#: Model -> seconds per batch, and seconds per task in it.
SECONDS: Mapping[str, tuple[float, float]] = {
    "resnet": (0.010, 0.002),
    "embed": (0.005, 0.001),
    "whisper": (0.080, 0.030),
}
_OTHER = (0.01, 0.002)


class Killed(Exception):
    """Raised instead of killing the process."""


class FleetWorker:
    """One worker: a thread while it runs."""

    def __init__(self, settings: Settings, number: int, host: str, models: Sequence[str]) -> None:
        self.number = number
        self.name = f"gpu{number}@{host}"
        self.models = tuple(models)
        self.state: UnitState = "inactive"
        self.entered = time.monotonic()
        #: When it last became ready, on the monotonic clock.
        self.ready_at: float | None = None
        self.restarts = 0
        #: Total seconds of simulated computing.
        self.computed_s = 0.0
        self._settings = settings
        self._host = host
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._done = self._told_done = 0
        self._told_at = self._told_s = 0.0

    def start(self) -> None:
        """Start it if it is not running."""
        if self.state in ("inactive", "failed"):
            self._stop.clear()
            self._enter("activating")
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop it after its batch."""
        if self.state in ("active", "activating"):
            self._enter("deactivating")
        self._stop.set()

    def join(self) -> None:
        """Wait until it has stopped."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _enter(self, state: UnitState) -> None:
        self.state, self.entered = state, time.monotonic()
        if state == "active":
            self.ready_at = self.entered

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._serve()
            except Killed:
                log.warning("worker_killed", worker=self.name)
                self.restarts += 1
                self._enter("activating")
                self._stop.wait(RESTART_S)
            except redis.RedisError as exc:
                log.warning("redis_away", worker=self.name, reason=str(exc))
                self._stop.wait(RESTART_S)
        self._enter("inactive")

    def _serve(self) -> None:
        with connect(self._settings.broker) as client:
            by = f"process {secrets.token_hex(8)}"
            store = Store(client, self.name, QUEUES, self._settings.queue, models=self.models, by=by)
            store.restore()  # the unit does this before its worker starts
            if self._stop.wait(STARTUP_S):
                return
            self._enter("active")
            self._done, self._told_at, self._told_s = 0, 0.0, self.computed_s
            self._told_done, since = 0, time.time()
            while not self._stop.is_set():
                tasks = store.claim(_BATCH, search=True)
                if tasks:
                    self._work(store, tasks)
                if time.monotonic() - self._told_at >= _BEAT_S:
                    state = DRAINED if store.is_drained() else "busy" if tasks else "idle"
                    self._beat(store, state, since)
                if not tasks:
                    self._stop.wait(_IDLE_S)
            store.leave()

    def _work(self, store: Store, tasks: Sequence[Claimed]) -> None:
        """Run a batch. Tasks that have killed a worker run alone, so that no other task is charged."""
        opened = [(task, decode(task.payload)) for task in tasks]
        alone = any(envelope.deaths for _, envelope in opened)
        for part in [[one] for one in opened] if alone else [opened]:
            self._batch(store, part)

    def _batch(self, store: Store, part: Sequence[tuple[Claimed, Envelope]]) -> None:
        ended = store.begin(
            [(task.seq, one.id, results.started(one.id, self.name, os.getpid())) for task, one in part]
        )
        if any(_fault(one) == "kill" for _, one in part):
            raise Killed
        whole, each = SECONDS.get(part[0][0].model, _OTHER)
        seconds = whole + each * len(part)
        time.sleep(seconds)
        self.computed_s += seconds
        finals = [self._final(*one) for place, one in enumerate(part) if place not in ended]
        store.settle(finals)
        store.release(task.seq for place, (task, _) in enumerate(part) if place in ended)
        self._done += len(finals)

    def _final(self, task: Claimed, envelope: Envelope) -> Final:
        tier = place_of(task.list_key).tier
        if _fault(envelope) == "fail":
            error = InferenceError("failure requested by the demo")
            meta, outcome = results.failure(envelope.id, error, worker=self.name), "failed"
        else:
            meta = results.success(envelope.id, {"ok": True}, worker=self.name)
            outcome = "completed"
        named = label(outcome, tier, task.model)
        return Final(task.seq, envelope.id, meta, reply=envelope.reply_to, label=named)

    def _beat(self, store: Store, state: str, since: float) -> None:
        now = time.monotonic()
        span = max(now - self._told_at, 0.001) if self._told_at else 0.0
        rate = (self._done - self._told_done) / span if span else 0.0
        busy = min(1.0, (self.computed_s - self._told_s) / span) if span else 0.0
        self._told_at, self._told_done, self._told_s = now, self._done, self.computed_s
        body = {
            "worker": self.name,
            "host": self._host,
            "domain": "demo",
            "gpu": self.number,
            "pid": os.getpid(),
            "state": state,
            "device": "cuda:0",
            "models": sorted(self.models),
            "versions": {model: f"{len(model):x}{ord(model[0]):x}c0de"[:7] for model in self.models},
            "missing": {},
            "queues": list(QUEUES),
            "done": self._done,
            "rate": round(rate, 3),
            "busy": round(busy, 3),
            "running": 0,
            "since": since,
            "version": __version__,
        }
        store.register(orjson.dumps(body), default=self.models[0])


def _fault(envelope: Envelope) -> str:
    return str((envelope.metadata or {}).get(FAULT, ""))


def _view(one: FleetWorker) -> UnitView:
    now = time.monotonic()
    ready_age_s = None if one.ready_at is None else now - one.ready_at
    return UnitView(state=one.state, age_s=now - one.entered, restarts=one.restarts, ready_age_s=ready_age_s)


class FleetUnits:
    """The simulated units of one host."""

    def __init__(self, workers: Mapping[int, FleetWorker]) -> None:
        self.workers = workers

    async def open(self) -> None:
        """Do nothing."""

    async def states(self, numbers: Collection[int]) -> Mapping[int, UnitView]:
        """Return the state of each instance."""
        return {number: _view(one) for number, one in self.workers.items() if number in numbers}

    async def act(self, verb: Verb, number: int) -> None:
        """Start, stop or reset one."""
        if verb == "start":
            self.workers[number].start()
        elif verb == "stop":
            self.workers[number].stop()

    async def close(self) -> None:
        """Wait until all of them have stopped."""
        for one in self.workers.values():
            one.stop()
        for one in self.workers.values():
            one.join()
