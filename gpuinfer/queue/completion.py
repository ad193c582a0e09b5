# SPDX-License-Identifier: Apache-2.0
"""What the shell completes from Redis: workers, models, ids of tasks. Silent where it cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from gpuinfer.errors import GpuinferError

if TYPE_CHECKING:
    import redis

#: No more than this many are offered.
MOST = 100
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def from_redis(read: Callable[[redis.Redis], Iterable[str]], user: str = "api") -> Complete:
    """Return a completion by what ``read`` finds. ``user``: whose password root takes, as for the command."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from redis.exceptions import RedisError

        from gpuinfer.queue.connection import connect
        from gpuinfer.settings import load

        try:
            file = ctx.find_root().params.get("file")
            with connect(load(file, user=user, only=("broker",)).settings.broker, retries=0) as client:
                names = [name for name in read(client) if name.startswith(incomplete)]
        except (GpuinferError, RedisError, OSError):
            return []  # a shell's prompt is no place for errors
        return [CompletionItem(name) for name in names[:MOST]]

    return complete


def models(client: redis.Redis) -> list[str]:
    """Return the models that the fleet knows."""
    from gpuinfer.queue.keys import CATALOGUE

    found: list[bytes] = client.zrange(CATALOGUE, 0, -1)  # type: ignore[assignment]  # not decoded
    return sorted(name.decode(errors="replace") for name in found)


def ended(client: redis.Redis) -> list[str]:
    """Return the ids of the tasks that ended last, the newest first."""
    from gpuinfer.queue.history import Search
    from gpuinfer.queue.scripts import bind

    search = Search(limit=MOST)
    search.take(bind(client, "history")(args=search.args), 0.0)
    return [task.id for task in search.page.tasks]


def dead(client: redis.Redis) -> list[str]:
    """Return the ids of dead letters."""
    from gpuinfer.queue.dead import ids

    return ids(client)


def workers(client: redis.Redis) -> list[str]:
    """Return the workers that were seen, by name; this host's by number, too."""
    import socket

    from gpuinfer.queue.drained import known

    found = known(client)
    here = f"@{socket.gethostname()}"
    return [*(name.removeprefix("gpu").removesuffix(here) for name in found if name.endswith(here)), *found]
