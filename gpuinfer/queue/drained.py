# SPDX-License-Identifier: Apache-2.0
"""Workers that an administrator has drained: each finishes what it holds, claims nothing, and stays up.

A worker stays drained, by its name, until it is resumed, even if the worker, its host or Redis restarts: an
administrator who needs the GPU does not want tasks there because something restarted. Only drained workers
are stored.
"""

from __future__ import annotations

import redis

from gpuinfer.queue import keys
from gpuinfer.queue.scripts import bind

#: A drained worker's state in its heartbeat: while it finishes what it holds, and after that.
FINISHING, DRAINED = "draining", "drained"


def set_drained(client: redis.Redis, worker: str, drained: bool) -> bool:
    """Drain ``worker`` (``gpu0@host``), or resume it; return False if it already was in that state.

    Raises redis-py's errors.
    """
    return bool(bind(client, "drain")(args=[worker, int(drained)]))


def names(client: redis.Redis) -> list[str]:
    """Return the drained workers, sorted. Raises redis-py's errors."""
    return parse(client.get(keys.DRAINED))  # type: ignore[arg-type]  # not awaited


def parse(text: bytes | None) -> list[str]:
    """Return the names in the value of ``keys.DRAINED``."""
    return (text or b"").decode(errors="replace").split()


def known(client: redis.Redis) -> list[str]:
    """Return the workers that were seen and have not left, and the drained ones. Raises redis-py's errors."""
    seen: list[bytes] = client.zrange(keys.WORKERS, 0, -1)  # type: ignore[assignment]  # not decoded
    return sorted({*(name.decode() for name in seen), *names(client)})
