# SPDX-License-Identifier: Apache-2.0
"""Shell completion from Redis: workers, models, task ids. Offers nothing if Redis cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from gpuinfer.errors import GpuinferError
from gpuinfer.names import QUEUES

if TYPE_CHECKING:
    import redis

#: Maximum completions offered; maximum of one worker's running tasks, whose messages have to be read.
MOST, MOST_OF_A_WORKER = 100, 10
#: Seconds to wait for each answer from Redis.
PATIENCE_S = 1.0
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def from_redis(read: Callable[[redis.Redis], Iterable[str]], user: str = "api") -> Complete:
    """Return a completion by what ``read`` finds. ``user``: root logs in as this Redis user."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from redis.exceptions import RedisError

        from gpuinfer.queue.connection import connect
        from gpuinfer.settings import load

        try:
            file = ctx.find_root().params.get("file")
            broker = load(file, user=user, only=("broker",)).settings.broker
            with connect(broker, retries=0, patience_s=PATIENCE_S) as client:
                names = [name for name in read(client) if name.startswith(incomplete)]
        except (GpuinferError, RedisError, OSError):
            return []  # a shell's prompt is no place for errors
        return [CompletionItem(name) for name in names[:MOST]]

    return complete


def queues(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the queues for all models; the user types the rest of one such as batch.resnet."""
    return [CompletionItem(name) for name in QUEUES if name.startswith(incomplete)]


def models(client: redis.Redis) -> list[str]:
    """Return the models that the fleet knows."""
    from gpuinfer.queue.keys import CATALOGUE

    found: list[bytes] = client.zrange(CATALOGUE, 0, -1)  # type: ignore[assignment]  # not decoded
    return sorted(name.decode(errors="replace") for name in found)


def ended(client: redis.Redis, status: str | None = None) -> list[str]:
    """Return the ids of the tasks that ended last, the newest first; ``status``: only those."""
    from gpuinfer.queue.history import Search
    from gpuinfer.queue.scripts import bind

    search = Search(limit=MOST, status=status)
    search.take(bind(client, "history")(args=search.args), 0.0)
    return [task.id for task in search.page.tasks]


def failed(client: redis.Redis) -> list[str]:
    """Return the ids of tasks that can be retried: failed tasks, then dead letters, the newest first."""
    from gpuinfer.queue.keys import DEAD_AGES

    dead: list[bytes] = client.zrange(DEAD_AGES, -MOST, -1)  # type: ignore[assignment]  # not decoded
    letters = [name.decode(errors="replace") for name in reversed(dead)]
    return [*dict.fromkeys([*ended(client, "failed"), *letters])]


def running(client: redis.Redis) -> list[str]:
    """Return the ids of running tasks, a few of each worker."""
    from gpuinfer.queue.drained import known
    from gpuinfer.queue.keys import inflight
    from gpuinfer.queue.message import decode

    found = []
    for worker in known(client):
        record: bytes | None = client.hget(inflight(worker), "running")  # type: ignore[assignment]  # not decoded
        seqs = (record or b"").split()[:MOST_OF_A_WORKER]
        payloads: list[bytes | None] = client.hmget(inflight(worker), seqs) if seqs else []  # type: ignore[assignment]
        for payload in payloads:
            try:
                found.append(decode(payload or b"").id)
            except GpuinferError:  # settled meanwhile, or not a message
                continue
    return found


def workers(client: redis.Redis) -> list[str]:
    """Return the names of known workers; those of this host by number, too."""
    import socket

    from gpuinfer.queue.drained import known

    found = known(client)
    here = f"@{socket.gethostname()}"
    return [*(name.removeprefix("gpu").removesuffix(here) for name in found if name.endswith(here)), *found]
