# SPDX-License-Identifier: Apache-2.0
"""A worker's heartbeats: to systemd (READY, STATUS, WATCHDOG), and to Redis for the watcher.

The watchdog is fed from the main thread, and only while the running batch is within its hard limit. So
systemd detects a stuck event loop, a stuck batch and a GPU that hangs during a probe, but leaves a long batch
alone. See sd_notify(3) for the messages; without systemd they are dropped.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson
import redis
from sdnotify import SystemdNotifier

from gpuinfer import __version__
from gpuinfer.log import get_logger
from gpuinfer.queue.drained import DRAINED, FINISHING

if TYPE_CHECKING:
    from gpuinfer.worker.batcher import Batcher

log = get_logger(__name__)

#: Seconds between two looks at the clock, and between two reports.
BEAT_S = 1.0
REPORT_S = 5.0
#: Seconds beyond the hard limit, which should have ended it, after which a batch counts as stuck. A probe has
#: no limit and takes a millisecond.
STUCK_GRACE_S = 20.0
#: Maximum seconds for a stop, in addition to the running batch.
DRAIN_ALLOWANCE_S = 45.0
#: How many answers the main thread may wait for in a row, each its whole timeout, when Redis is deaf: the one
#: that tells, and those that Celery's orderly end of a connection asks for (five were seen).
DEAF_ANSWERS = 10
_EXTEND_EVERY_S = 10.0
#: Maximum characters of the reason why a model is not loaded.
MOST_REASON = 500


def extend(notifier: SystemdNotifier, seconds: float) -> None:
    """Ask systemd to extend the timeout of a start or stop."""
    notifier.notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")


def keep_asking(
    notifier: SystemdNotifier, limit_s: float, wait: Callable[[float], bool], clock: Callable[[], float]
) -> None:
    """Extend the timeout until ``wait(seconds)`` returns True, or for ``limit_s`` seconds."""
    deadline = clock() + limit_s
    while clock() < deadline:
        extend(notifier, 3 * _EXTEND_EVERY_S)
        if wait(_EXTEND_EVERY_S):
            return


@contextmanager
def starting(limit_s: float, what: str) -> Iterator[None]:
    """Extend systemd's start timeout while models load, up to ``limit_s`` seconds."""
    notifier, done = SystemdNotifier(), threading.Event()
    notifier.notify(f"STATUS=loading {what}")
    arguments = notifier, limit_s, done.wait, time.monotonic
    thread = threading.Thread(target=keep_asking, args=arguments, name="starting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Pulse:
    """Heartbeats of one worker process. Call it only from the main thread."""

    def __init__(
        self,
        batcher: Batcher,
        name: str,
        gpu: int,
        *,
        domain: str = "",
        missing: Mapping[str, str] | None = None,
        default: str | None = None,
        vitals: Callable[[], Mapping[str, Any]] = dict,
        notifier: SystemdNotifier | None = None,
        clock: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] = os.environ,
        redis_timeout_s: float = 5.0,
    ) -> None:
        self._batcher = batcher
        self._name = name
        self._gpu = gpu
        self._domain = domain
        #: The default model to set if the fleet has none; None: the first model, "": do not set one.
        self._default = default
        #: Further fields of a heartbeat (``vitals.Vitals``).
        self._vitals = vitals
        #: Model of its settings that failed to load -> reason.
        self._missing = {name: reason[:MOST_REASON] for name, reason in (missing or {}).items()}
        self._notifier = notifier or SystemdNotifier()
        self._clock = clock
        watchdog_s = int(environ.get("WATCHDOG_USEC") or 0) / 1e6
        self._feed_every_s = watchdog_s / 4
        #: Watchdog timeout needed, in seconds; 0: the unit's is enough.
        self._watchdog_s = DEAF_ANSWERS * redis_timeout_s if watchdog_s else 0.0
        self._watchdog_s = self._watchdog_s if self._watchdog_s > watchdog_s else 0.0
        self._fed_at = self._told_at = clock()
        self._told_done = 0
        self._since = time.time()
        self._status = self._refused = ""
        self._ready = self._away = self._stuck = False

    # -- what happens ---------------------------------------------------------------------

    def ready(self) -> None:
        """Report once to systemd that the models are loaded and warmed up."""
        if not self._ready:
            self._notifier.notify("READY=1")
            self._ready = True
            if self._watchdog_s:  # a worker waiting for Redis is not hung
                self._notifier.notify(f"WATCHDOG_USEC={int(self._watchdog_s * 1e6)}")
            if not self._away:
                self._report()

    def lost(self) -> None:
        """Redis is unavailable; the worker waits."""
        self._away = True
        self.ready()
        self._say(f"{self._what()}: waiting for Redis")

    def found(self) -> None:
        """Redis is back."""
        self._away = False

    def beat(self) -> None:
        """Feed the watchdog unless stuck; report every few seconds."""
        now = self._clock()
        stuck = self.stuck(now)
        if stuck and not self._stuck:
            hint = (
                "systemd's watchdog will kill it, and its tasks return to their queues; run gpuinfer doctor"
            )
            running = self._batcher.engine.current
            log.critical(
                "worker_stuck",
                device=self._batcher.device,
                task_ids=[task.id for task in running.tasks] if running is not None else [],
                reason=self._stands(now),
                hint=hint,
            )
        self._stuck = stuck
        if self._feed_every_s and now - self._fed_at >= self._feed_every_s and not stuck:
            self._notifier.notify("WATCHDOG=1")
            self._fed_at = now
        if now - self._told_at >= REPORT_S and self._ready and not self._away:
            self._report()

    def stuck(self, now: float) -> bool:
        """Whether the running batch (by its hard limit) or probe has made no progress for too long."""
        engine = self._batcher.engine
        batch = engine.current
        if batch is None and not engine.probing:
            return False
        limit_s = max((task.hard_limit_s for batch in engine.batches for task in batch.tasks), default=0.0)
        return now - engine.moved_at > limit_s + STUCK_GRACE_S

    def _stands(self, now: float) -> str:
        engine = self._batcher.engine
        what = "a probe of the idle GPU has not returned"
        if not engine.probing and (batch := engine.current) is not None:
            what = f"a batch of {batch.model} (hard limit {batch.hard_limit_s:g} s) has made no progress"
        return f"{what} for {now - engine.moved_at:.0f} s"

    def stopping(self) -> None:
        """Report to systemd that the worker drains, and how long its batches may take."""
        batch = self._batcher.engine.current
        rest = f"finishing a batch of {batch.size}" if batch is not None else "returning tasks"
        self._notifier.notify(f"STOPPING=1\nSTATUS={self._what()}: {rest}")
        left_s = sum(one.hard_limit_s for one in self._batcher.engine.batches)  # each takes its time
        extend(self._notifier, left_s + DRAIN_ALLOWANCE_S)
        if not self._away:
            self._write("draining", 0.0)

    def gone(self) -> None:
        """Delete the heartbeat: the worker has drained."""
        if self._away or not self._batcher.store.begun:
            return
        try:
            self._batcher.store.leave()
        except (redis.RedisError, OSError):
            return  # the heartbeat expires by itself

    # -- reporting ------------------------------------------------------------------------

    def _report(self) -> None:
        now, done = self._clock(), self._batcher.done
        rate = (done - self._told_done) / max(now - self._told_at, 0.001)
        self._told_at, self._told_done = now, done
        drained = self._is_drained()
        state = "busy" if self._batcher.engine.current is not None else "idle"
        if drained:
            state = DRAINED if self._batcher.state == "idle" else FINISHING
        waiting = self._write(state, rate)
        if waiting is None:
            return
        if drained:
            number = self._name.partition("@")[0].removeprefix("gpu")
            self._say(
                f"{self._what()}: {state}, takes nothing until gpuinfer worker resume {number}; {done:,} done"
            )
        else:
            self._say(f"{self._what()}: {done:,} done, {rate:,.0f}/s, {waiting:,} waiting")

    def _is_drained(self) -> bool:
        """Whether it is drained; False if Redis does not answer."""
        try:
            return self._batcher.store.begun and self._batcher.store.is_drained()
        except (redis.RedisError, OSError):
            return False

    def _what(self) -> str:
        without = f", without {', '.join(sorted(self._missing))}" if self._missing else ""
        return f"{', '.join(sorted(self._batcher.models))} on {self._batcher.device}{without}"

    def _say(self, status: str) -> None:
        if status != self._status:
            self._notifier.notify(f"STATUS={status}")
            self._status = status

    def _write(self, state: str, rate: float) -> int | None:
        """Write the heartbeat; return the number of waiting tasks, or None if Redis does not answer.

        Not before this process has begun an epoch: until then another process may own the name.
        """
        store = self._batcher.store
        if not store.begun:
            return None
        try:
            default = store.models[0] if self._default is None else self._default
            waiting = store.register(orjson.dumps(self._body(state, rate)), default=default)
        except redis.ResponseError as exc:  # refused: the worker continues, but counts as dead
            if str(exc) != self._refused:
                hint = "without heartbeats this worker counts as dead; run gpuinfer doctor redis"
                log.error("heartbeat_refused", worker=self._name, reason=str(exc), hint=hint)
            self._refused = str(exc)
            return None
        except (redis.RedisError, OSError):
            return None  # the consumer logs that once
        self._refused = ""
        return waiting

    def _body(self, state: str, rate: float) -> dict[str, Any]:
        batch = self._batcher.engine.current
        return {
            "worker": self._name,
            "host": socket.gethostname(),
            "domain": self._domain,
            "gpu": self._gpu,
            "pid": os.getpid(),
            "state": state,
            "device": self._batcher.device,
            "models": sorted(self._batcher.models),
            "versions": dict(self._batcher.store.versions),
            "missing": self._missing,
            "queues": list(self._batcher.store.queues),
            "done": self._batcher.done,
            "rate": round(rate, 3),
            "running": 0 if batch is None else len(batch.tasks),
            "since": self._since,
            "version": __version__,
            **self._vitals(),
        }
