# SPDX-License-Identifier: Apache-2.0
"""Writes a watcher's counters and the fleet's metrics history to Redis.

The live watcher whose host name sorts first writes the history (``queue.series``): the main series every
10 s, and their means every 5 min. A watcher that takes over continues from the state in Redis.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import orjson
import redis

from gpuinfer.errors import GpuinferError
from gpuinfer.log import get_logger
from gpuinfer.metrics.collector import REFUSALS
from gpuinfer.metrics.gather import Snapshot, gather
from gpuinfer.metrics.steps import MOST_GAP_S, Steps, state
from gpuinfer.queue import keys, series
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.series import COARSE, FINE
from gpuinfer.queue.tally import Tally

log = get_logger(__name__)

#: Maximum number of models, and of workers, with their own series.
MOST_MODELS, MOST_WORKERS = 15, 60
FAILED = ("failed", "dead")


class Recorder:
    """Writes for one host's watcher. Call it in a thread: all methods but ``count`` block."""

    def __init__(self, client: redis.Redis, host: str, clock: Callable[[], float] = time.time) -> None:
        self._client = client
        self._host = host
        self._clock = clock
        self._account = bind(client, "account")
        self._lock = threading.Lock()
        self._tally = Tally()
        self._slot = self._coarse = -1
        self._refused = ""

    def count(self, kind: str, what: str) -> None:
        """Count a decision or an Xid of this host. Any thread may call it."""
        with self._lock:
            self._tally.count(kind, what, self._host)

    def step(self, live_hosts: Iterable[str]) -> None:
        """Write what is due. ``live_hosts``: the hosts with live watchers, including this one."""
        try:
            self._flush()
            slot = int(self._clock() // FINE.step_s)
            if slot != self._slot and min(live_hosts, default=self._host) == self._host:
                self._slot = slot
                self._record()
        except redis.ResponseError as exc:
            if str(exc) != self._refused:
                log.warning("history_not_kept", reason=str(exc), hint="tried again every 10 s")
            self._refused = str(exc)
        except (redis.RedisError, OSError, GpuinferError):
            return  # the next probe reports that Redis is unavailable
        else:
            self._refused = ""

    def _flush(self) -> None:
        with self._lock:
            if self._tally.elapsed and self._tally.dirty:
                self._account(keys=[], args=self._tally.args())
                self._tally.confirm()

    def _record(self) -> None:
        seen = gather(self._client, weigh=False)
        models = _models(seen)
        steps = self._steps()
        for begin, rates in steps.add(seen.now, _totals(seen)).items():
            shown = {name: rate for name, rate in rates.items() if _is_shown(name, models)}
            series.write(self._client, FINE, begin, shown)
        # After the rates: if writing those fails, the next step computes them again from the same totals.
        self._client.set(keys.SERIES_STATE, orjson.dumps(state(steps)), ex=int(2 * MOST_GAP_S))
        series.write(self._client, FINE, seen.now, sample(seen, models))
        coarse = int(seen.now // COARSE.step_s)
        if coarse != self._coarse:
            self._thin(coarse * COARSE.step_s)
            self._coarse = coarse

    def _steps(self) -> Steps:
        """Return the previous totals; Redis keeps them for a watcher that takes over."""
        kept: bytes | None = self._client.get(keys.SERIES_STATE)  # type: ignore[assignment]  # not decoded
        try:
            return Steps.of(orjson.loads(kept or b"null"))
        except orjson.JSONDecodeError:
            return Steps()

    def _thin(self, end: int) -> None:
        """Write the means of the five minutes before ``end``."""
        series.forget(self._client, end)
        begin = end - COARSE.step_s
        known = [name for name, at in series.names(self._client).items() if at >= begin]
        found = series.read_at(self._client, known, end - 1, COARSE.step_s)
        means = {}
        for name, values in found.values.items():
            there = [value for value in values if value is not None]
            if there:
                means[name] = sum(there) / len(there)
        if means:
            series.write(self._client, COARSE, begin, means)


def sample(seen: Snapshot, models: Iterable[str]) -> dict[str, float]:
    """Return the current value of each series, except rates of the fleet and of models. Pure."""
    values = {
        "waiting": float(seen.depth.total_waiting),
        "in_flight": float(seen.depth.total_inflight),
        "workers": float(len(seen.alive)),
        "dead_letters": float(seen.depth.dead_letters),
        "redis_bytes": float(seen.redis.get("used_memory", 0)),
    }
    busy = {worker: _number(body.get("busy")) for worker, body in seen.alive.items()}
    if busy:
        values["busy"] = sum(busy.values()) / len(busy)
    for worker in sorted(seen.alive)[:MOST_WORKERS]:
        values[f"busy:{worker}"] = busy[worker]
        values[f"ended:{worker}"] = _number(seen.alive[worker].get("rate"))
    oldest = seen.oldest()
    for model in models:
        lanes = [lane for lane in seen.depth.lanes if lane.model == model]
        values[f"waiting:{model}"] = float(sum(sum(seen.depth.lanes[lane].values()) for lane in lanes))
        values[f"oldest:{model}"] = max((s for lane, s in oldest.items() if lane.model == model), default=0.0)
    return values


def _models(seen: Snapshot) -> list[str]:
    """Return the models with series, the most recently seen first."""
    known = sorted(seen.depth.catalogue, key=lambda name: (-seen.depth.catalogue[name], name))
    return known[:MOST_MODELS]


def _is_shown(name: str, models: Collection[str]) -> bool:
    """Whether a rate belongs to the fleet, or to a model with series."""
    _, of_a_model, model = name.partition(":")
    return not of_a_model or model in models


def _totals(seen: Snapshot) -> Mapping[str, int]:
    """Return the totals by the name of the series of their rate."""
    found = dict.fromkeys(("ended", "failed", "requests", "refused"), 0)
    found |= {f"{kind}:{model}": 0 for model in seen.depth.catalogue for kind in ("ended", "failed")}
    for end, count in seen.ended.items():
        for kind in ("ended", "failed") if end.outcome in FAILED else ("ended",):
            for name in (kind, f"{kind}:{end.lane.model}"):
                found[name] = found.get(name, 0) + count
    found["requests"] = seen.total("status")
    found["refused"] = sum(
        count for (kind, code, _), count in seen.counts.items() if kind == "error" and code in REFUSALS
    )
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
