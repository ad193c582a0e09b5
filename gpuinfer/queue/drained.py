# SPDX-License-Identifier: Apache-2.0
"""Workers that an administrator has drained: each finishes what it holds, claims nothing, and stays up.

It is so by the worker's name until it is resumed, also after a restart of the worker, its host or Redis: who
works on a GPU does not want work there because something was restarted. Nothing stands there for others.
"""

from __future__ import annotations

import redis

from gpuinfer.queue import keys
from gpuinfer.queue.scripts import bind

#: What a worker's heartbeat calls it: while it finishes, and then.
FINISHING, DRAINED = "draining", "drained"


def set_drained(client: redis.Redis, worker: str, drained: bool) -> bool:
    """Drain ``worker`` (``gpu0@host``), or resume it; return whether that changed anything.

    Raises redis-py's errors.
    """
    return bool(bind(client, "drain")(args=[worker, int(drained)]))


def names(client: redis.Redis) -> list[str]:
    """Return the workers that are drained, sorted. Raises redis-py's errors."""
    return parse(client.get(keys.DRAINED))  # type: ignore[arg-type]  # not awaited


def parse(text: bytes | None) -> list[str]:
    """Read what stands under ``keys.DRAINED``."""
    return (text or b"").decode(errors="replace").split()


def known(client: redis.Redis) -> list[str]:
    """Return the workers that were seen and have not left, and those that are drained. Raises redis-py's
    errors."""
    seen: list[bytes] = client.zrange(keys.WORKERS, 0, -1)  # type: ignore[assignment]  # not decoded
    return sorted({*(name.decode() for name in seen), *names(client)})
