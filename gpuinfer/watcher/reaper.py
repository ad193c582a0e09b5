# SPDX-License-Identifier: Apache-2.0
"""The reaper: puts back the tasks in flight of workers that are gone.

A worker's tasks are put back at its next start, or when systemd notices that it died. The reaper is for
workers for which neither happens: on a host that was lost or renamed, of a unit that died while Redis was
away, or a plain process.

A heartbeat's age is measured on Redis's clock. That is not enough: after Redis was away, or its clock was
set, all heartbeats are old although all workers live. So the reaper must also have seen nothing new for a
while, on its own clock. A worker that is reaped although it runs (a network partition) drops its tasks and
continues; their results count once. Two reapers at once do no harm: a restore is refused if a newer epoch has
begun than the one that its reaper saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import redis

from gpuinfer import locks
from gpuinfer.errors import GpuinferError, TakenBack, WorkerRunning
from gpuinfer.locks import LockState
from gpuinfer.log import get_logger
from gpuinfer.queue.callers import tidy
from gpuinfer.queue.connection import AWAY
from gpuinfer.queue.epoch import REAPER
from gpuinfer.queue.heartbeats import FRESH_S
from gpuinfer.queue.orphans import Holder, ago, holders
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings
from gpuinfer.watcher.state import UnitState
from gpuinfer.watcher.units import UnitView

log = get_logger(__name__)

#: Seconds between two probes for workers that hold tasks.
PROBE_EVERY_S = 2.0
#: Seconds between two probes for names that do not return.
FORGET_EVERY_S = 60.0
#: Seconds between two probes for callers that can be forgotten.
TIDY_EVERY_S = 600.0
#: Seconds for which a reaper must itself have seen nothing of another host's worker. A worker that waited for
#: a Redis that does not answer returns sooner.
WITNESS_S = 60.0
#: Two probes further apart than this prove nothing about the time between them.
GAP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a worker that holds tasks."""

    #: Seconds since it was last seen, by Redis's clock; and for how long this reaper has seen nothing new.
    silent_s: float
    watched_s: float
    host: str
    #: The state of the unit of its name on this host; None: there is none.
    unit: UnitState | None = None
    #: As far as is known, its heartbeats came from this host: not from another of this name, nor from before
    #: this host's boot.
    own: bool = True
    #: Whether a process on this host holds the lock of its name.
    lock: LockState = "free"
    #: The watcher of its host, not this one, is alive.
    watcher_alive: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to put back what a worker holds, and why."""

    reap: bool
    why: str


def judge(facts: Facts, reap_after_s: float) -> Verdict:
    """Decide about one worker. ``reap_after_s``: how long a host must be silent; 0: it is never reaped."""
    if facts.silent_s <= FRESH_S:
        return Verdict(False, "its heartbeat is fresh")
    if facts.lock == "held":
        return Verdict(False, "its process runs: it holds its lock")
    if facts.lock == "unknown":
        return Verdict(False, "whether its process runs is not known: its lock cannot be read")
    silence = f"nothing was heard of it for {ago(facts.silent_s)}"
    if facts.unit is not None:
        if facts.unit not in ("inactive", "failed"):
            return Verdict(False, f"its unit is {facts.unit}")
        patience_s = FRESH_S if facts.own else max(reap_after_s, WITNESS_S)
        if facts.silent_s < patience_s or facts.watched_s < min(patience_s, WITNESS_S):
            return Verdict(False, "its unit is down, and it is put back if no heartbeat comes")
        return Verdict(True, f"its unit is {facts.unit}, its lock is free, and {silence}")
    if facts.watcher_alive:
        return Verdict(False, f"the watcher of {facts.host} is alive, and handles it")
    if reap_after_s <= 0:
        return Verdict(False, "watcher.reap_after_s is 0")
    if facts.silent_s < reap_after_s or facts.watched_s < min(reap_after_s, WITNESS_S):
        return Verdict(False, f"it is put back when it is silent for {reap_after_s:g} s")
    return Verdict(True, f"{silence}, nor of a watcher of {facts.host}")


@dataclass(slots=True)
class _Watched:
    seen_at: float
    epoch: int
    since: float


class Reaper:
    """Puts back the tasks of dead workers, for the watcher of one host. Blocking: call it in a thread."""

    def __init__(
        self,
        client: redis.Redis,
        host: str,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._host = host
        self._settings = settings
        self._clock = clock
        self._forget = bind(client, "forget")
        self._probed_at = -PROBE_EVERY_S
        self._tidy, self._trim = bind(client, "tidy"), bind(client, "trim")
        self._forgot_at = -FORGET_EVERY_S
        self._tidied_at = -TIDY_EVERY_S
        self._watched: dict[str, _Watched] = {}
        #: Worker -> the reason that was last logged: each is logged once.
        self._said: dict[str, str] = {}

    def step(
        self, views: Mapping[int, UnitView], live_hosts: Iterable[str], *, away: bool = False
    ) -> list[str]:
        """Probe, at most every two seconds, and reap; return the names of the reaped workers.

        ``views``: this host's units; ``live_hosts``: hosts whose watcher is alive; ``away``: Redis is away.
        """
        now = self._clock()
        if away:
            self._watched.clear()  # no worker could send a heartbeat
            return []
        if now - self._probed_at < PROBE_EVERY_S:
            return []
        if now - self._probed_at > GAP_S:
            self._watched.clear()
        self._probed_at = now
        self._forget_names(now)
        try:
            found = holders(self._client)
            return self._judge_all(found, views, frozenset(live_hosts), now)
        except AWAY:
            self._watched.clear()
        except redis.RedisError as exc:
            self._say("", "reap_failed", str(exc), hint="tried again in 2 s")
        return []

    def _forget_names(self, now: float) -> None:
        """Forget the epochs of workers that hold nothing and were not seen for a day; less often, callers
        with nothing waiting, and the inputs of tasks that failed long ago.
        """
        if now - self._forgot_at < FORGET_EVERY_S:
            return
        self._forgot_at = now
        try:
            self._forget()
            if now - self._tidied_at >= TIDY_EVERY_S:
                self._tidied_at = now
                tidy(self._tidy)
                queue = self._settings.queue
                bounds = (queue.max_failed, queue.max_failed_bytes, queue.failed_ttl_s)
                while self._trim(args=[*bounds, 1]):
                    pass
        except AWAY:
            return  # the probe reports that
        except redis.RedisError as exc:
            log.warning("names_not_forgotten", reason=str(exc), hint="tried again in a minute")

    def _judge_all(
        self, found: list[Holder], views: Mapping[int, UnitView], live_hosts: frozenset[str], now: float
    ) -> list[str]:
        self._watch(found, now)
        reaped = []
        for holder in found:
            facts = self._facts(holder, views, live_hosts, now)
            verdict = judge(facts, self._settings.watcher.reap_after_s)
            if verdict.reap:
                reaped += self._reap(holder, verdict)
            elif holder.silent:
                self._say(
                    holder.worker,
                    "worker_silent",
                    verdict.why,
                    in_flight=holder.tasks,
                    silent_s=round(holder.silent_s),
                )
        return reaped

    def _watch(self, found: list[Holder], now: float) -> None:
        """Record since when nothing new was seen of each."""
        before = self._watched
        self._watched = {}
        for holder in found:
            was = before.get(holder.worker)
            if was is None or (was.seen_at, was.epoch) != (holder.seen_at, holder.epoch):
                was = _Watched(holder.seen_at, holder.epoch, now)
            self._watched[holder.worker] = was
        silent = {holder.worker for holder in found if holder.silent}
        self._said = {worker: said for worker, said in self._said.items() if worker in silent or not worker}

    def _facts(
        self, holder: Holder, views: Mapping[int, UnitView], live_hosts: frozenset[str], now: float
    ) -> Facts:
        ours = holder.host == self._host
        own = locks.known_domain(self._settings.worker.run_dir)
        unit = next(
            (view.state for n, view in views.items() if f"gpu{n}@{self._host}" == holder.worker), None
        )
        return Facts(
            silent_s=holder.silent_s,
            watched_s=now - self._watched[holder.worker].since,
            host=holder.host,
            own=not own or holder.domain in ("", own),
            unit=unit,
            lock=locks.state(self._settings.worker.run_dir, holder.worker) if ours else "free",
            watcher_alive=not ours and holder.host in live_hosts,
        )

    def _reap(self, holder: Holder, verdict: Verdict) -> list[str]:
        settings = self._settings
        by = f"{REAPER} watcher@{self._host}"
        store = Store(self._client, holder.worker, settings.worker.queues, settings.queue, by=by)
        try:
            done = store.take_back(after=holder.epoch)
        except (TakenBack, WorkerRunning) as exc:  # another reaper, or the worker itself, was first
            log.info("reap_overtaken", worker=holder.worker, reason=str(exc))
            return []
        except AWAY:
            raise
        except (redis.RedisError, GpuinferError) as exc:
            self._say(holder.worker, "reap_failed", str(exc), hint="tried again in 2 s")
            return []
        self._said.pop(holder.worker, None)
        log.warning(
            "reaped",
            worker=holder.worker,
            why=verdict.why,
            in_flight=holder.tasks,
            silent_s=round(holder.silent_s),
            returned=done.returned,
            dead=len(done.dead),
            task_ids=(*done.ids, *done.dead),
        )
        return [holder.worker]

    def _say(self, worker: str, action: str, why: str, **fields: object) -> None:
        """Log a worker's reason unless it was the last one logged."""
        if self._said.get(worker) == why:
            return
        self._said[worker] = why
        failed = action == "reap_failed"
        say = log.error if failed else log.info
        named = {"worker": worker} if worker else {}
        say(action, **named, **{"reason" if failed else "why": why}, **fields)
