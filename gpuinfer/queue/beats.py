# SPDX-License-Identifier: Apache-2.0
"""Workers' heartbeats in Redis: written by each worker, read by watchers.

They have no time to live: a full Redis evicts first what would expire first, and would have taken every
worker for dead. How old one is, Redis's own clock tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import redis

from gpuinfer.queue import keys
from gpuinfer.queue.scripts import bind

#: A heartbeat older than this is none.
FRESH_S = 30.0

#: Called with the worker, the lists it serves and what it says of itself; returns how many tasks wait there.
Writer = Callable[[str, Sequence[str], Mapping[str, Any]], int]


def writer(client: redis.Redis) -> Writer:
    """Return a function that writes a heartbeat. Raises redis-py's errors."""
    script = bind(client, "heartbeat")

    def write(worker: str, lists: Sequence[str], body: Mapping[str, Any]) -> int:
        return int(script(keys=[keys.heartbeat(worker), *lists], args=[orjson.dumps(body)]))

    return write


def fresh(client: redis.Redis, workers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the heartbeats of those of ``workers`` that live. Raises redis-py's errors."""
    if not workers:
        return {}
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.mget([keys.heartbeat(worker) for worker in workers])
        (seconds, microseconds), texts = pipe.execute()
    found = {worker: orjson.loads(text) for worker, text in zip(workers, texts, strict=True) if text}
    now = seconds + microseconds / 1e6
    return {worker: body for worker, body in found.items() if now - body.get("at", 0.0) <= FRESH_S}
