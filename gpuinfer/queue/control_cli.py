# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer queue purge``, ``pause`` and ``resume``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import UsageError
from gpuinfer.plural import many, tasks_wait
from gpuinfer.queue import completion
from gpuinfer.queue.show import as_json_option, print_json

if TYPE_CHECKING:
    import redis

    from gpuinfer.settings import Loaded


@contextmanager
def _connected(loaded: Loaded) -> Iterator[redis.Redis]:
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    with typed_errors(user_of(loaded.settings.broker)), connect(loaded.settings.broker) as client:
        yield client


@click.command(
    epilog=examples("gpuinfer queue purge batch", "gpuinfer queue purge realtime.resnet --yes --json")
)
@click.argument("name", metavar="[QUEUE]", required=False, shell_complete=completion.queues)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@as_json_option
@click.pass_obj
def purge(loaded: Loaded, name: str | None, yes: bool, as_json: bool) -> int:
    """Revoke all waiting tasks in QUEUE. Default: all queues.

    QUEUE is realtime, default or batch (for all models), or the queue of one model: batch.resnet. Tasks with
    an ETA are revoked, too; tasks that a worker has claimed continue. Clients that wait for these tasks are
    told at once, and their idempotency keys can be used again.
    """
    from gpuinfer.queue.purge import check, lines
    from gpuinfer.queue.purge import purge as end

    queue = None if name is None else check(name)
    with _connected(loaded) as client:
        found = lines(client, queue)
        count = sum(line.tasks for line in found)
        if count and not yes:
            if as_json:
                would = f"{many(count, 'task')} would be revoked"
                raise UsageError(f"{would}; --json needs --yes to confirm that")
            if not click.confirm(
                f"{tasks_wait(count)} in {queue or 'all queues'}. Revoke all of them?", err=True
            ):
                return 1
        ended = end(client, found, loaded.settings.queue)
    if as_json:
        print_json({"queue": queue, "purged": ended})
    else:
        click.echo(f"{ended} purged")
    return 0


@click.command(epilog=examples("gpuinfer queue pause batch", "gpuinfer queue pause realtime.resnet"))
@click.argument("name", metavar="QUEUE", shell_complete=completion.queues)
@as_json_option
@click.pass_obj
def pause(loaded: Loaded, name: str, as_json: bool) -> None:
    """Pause QUEUE: new tasks are accepted, but wait until it is resumed.

    QUEUE is realtime, default or batch (for all models), or the queue of one model: batch.resnet. Tasks that
    a worker has claimed continue.
    """
    _set(loaded, name, as_json, paused=True)


@click.command(epilog=examples("gpuinfer queue resume batch"))
@click.argument("name", metavar="QUEUE", shell_complete=completion.queues)
@as_json_option
@click.pass_obj
def resume(loaded: Loaded, name: str, as_json: bool) -> None:
    """Let workers claim tasks from QUEUE again.

    A queue for all models (batch) and the queue of one model (batch.resnet) are paused and resumed
    separately.
    """
    _set(loaded, name, as_json, paused=False)


def _set(loaded: Loaded, name: str, as_json: bool, *, paused: bool) -> None:
    from gpuinfer.journal.sender import say_warning
    from gpuinfer.queue import catalogue
    from gpuinfer.queue.purge import check, set_paused

    queue = check(name)
    with _connected(loaded) as client:
        changed = set_paused(client, queue, paused)
        known = catalogue.names(client)
    if as_json:
        print_json({"queue": queue, "paused": paused, "changed": changed})
        return
    click.echo(f"{queue}: {'' if changed else 'already '}{'paused' if paused else 'not paused'}")
    model = queue.partition(".")[2]
    if paused and model and model not in known:
        say_warning(f"the fleet knows no model {model!r}; known: {', '.join(known) or 'none'}")
