# SPDX-License-Identifier: Apache-2.0
"""Workers' heartbeats in Redis: written by each worker, read by watchers, fronts and commands.

Heartbeats have no TTL: a full Redis evicts first what expires first, so all workers would seem dead. Redis's
clock measures their age.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import redis.asyncio

from gpuinfer.errors import WorkerRunning
from gpuinfer.queue import keys

#: A worker with no heartbeat for this long is taken for dead. Workers send one in half this time.
FRESH_S = 10.0


def fresh(client: redis.Redis, workers: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the heartbeats of live workers among ``workers`` (None: all). Raises redis-py's errors."""
    return alive(*read(client, workers))


def alive(beats: Mapping[str, dict[str, Any]], now: float) -> dict[str, dict[str, Any]]:
    """Return the heartbeats that are fresh at ``now``, which is Redis's time."""
    return {worker: body for worker, body in beats.items() if now - body.get("at", 0.0) <= FRESH_S}


def read(
    client: redis.Redis, workers: Sequence[str] | None = None
) -> tuple[dict[str, dict[str, Any]], float]:
    """Return the last heartbeats, of any age, and Redis's time. Raises redis-py's errors."""
    if workers is None:
        names: list[bytes] = client.zrange(keys.WORKERS, 0, -1)  # type: ignore[assignment]  # not decoded
        workers = [name.decode() for name in names]
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for worker in workers:
            pipe.get(keys.heartbeat(worker))
        return parse(workers, pipe.execute())


def parse(workers: Sequence[str], answers: Sequence[Any]) -> tuple[dict[str, dict[str, Any]], float]:
    """Return heartbeats, and Redis's time, from the answers to TIME and a GET for each worker."""
    (seconds, microseconds), *texts = answers
    found = {
        worker: body for worker, text in zip(workers, texts, strict=True) if (body := _body(text)) is not None
    }
    return found, seconds + microseconds / 1e6


def _body(text: bytes | None) -> dict[str, Any] | None:
    """Return a heartbeat's content; None if there is none, or if it is malformed."""
    try:
        body = orjson.loads(text or b"")
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) and isinstance(body.get("at", 0.0), int | float) else None


async def aread(client: redis.asyncio.Redis) -> tuple[dict[str, dict[str, Any]], float]:
    """Return the last heartbeats of all workers, and Redis's time, as ``read`` does."""
    found: list[bytes] = await client.zrange(keys.WORKERS, 0, -1)  # type: ignore[assignment]  # not decoded
    names = [name.decode() for name in found]
    async with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for name in names:
            pipe.get(keys.heartbeat(name))
        return parse(names, await pipe.execute())


#: The fields of a heartbeat that are shown, if present.
_SHOWN = (
    *("host", "gpu", "pid", "state", "device", "models", "versions", "missing", "queues"),
    *("done", "rate", "running", "version", "busy", "memory_bytes", "device_memory_bytes", "load_s"),
)


def shown(beats: Mapping[str, dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """Return heartbeats for JSON, sorted by worker; ``alive`` and ``seen_s`` are at Redis's time ``now``."""
    return [
        {"worker": worker}
        | {name: body[name] for name in _SHOWN if name in body}
        | {"alive": now - (at := body.get("at", 0.0)) <= FRESH_S, "seen_s": round(max(0.0, now - at), 1)}
        for worker, body in sorted(beats.items())
    ]


def wait_for_namesake(
    client: redis.Redis, worker: str, domain: str, *, pause: Callable[[float], object], every_s: float = 0.5
) -> None:
    """Return once no process on another host sends heartbeats under this worker's name.

    If one died just now, this waits until its heartbeat is old. Raises WorkerRunning if one still sends
    heartbeats, and redis-py's errors. ``domain`` is the caller's lock domain: no other process in it can run,
    because the caller holds the lock.
    """
    first_at: float | None = None
    while True:
        body = fresh(client, [worker]).get(worker)
        if body is None or body.get("domain") == domain:
            return
        if first_at is not None and body["at"] > first_at:
            raise WorkerRunning(
                f"another host is called {body.get('host')}, too, and runs {worker} as process "
                f"{body.get('pid')}; give one of them another name"
            )
        first_at = body["at"]
        pause(every_s)
