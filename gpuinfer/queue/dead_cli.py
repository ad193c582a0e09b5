# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer dead``: list, show, retry and drop dead letters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
import orjson

from gpuinfer.cli_help import examples
from gpuinfer.errors import GpuinferError, UsageError
from gpuinfer.queue.show import as_json_option, print_json, print_table

if TYPE_CHECKING:
    import redis

    from gpuinfer.queue.dead import Letter
    from gpuinfer.settings import Loaded


@contextmanager
def _connected(loaded: Loaded) -> Iterator[redis.Redis]:
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    with typed_errors(user_of(loaded.settings.broker)), connect(loaded.settings.broker) as client:
        yield client


@click.group()
def dead() -> None:
    """List, retry and drop dead letters.

    A dead letter is a task that killed its workers or could not be read. It is kept until it is retried or
    dropped, within queue.max_dead, max_dead_bytes and dead_ttl_s.
    """


@dead.command("list", epilog=examples("gpuinfer dead list --json"))
@as_json_option
@click.pass_obj
def list_(loaded: Loaded, as_json: bool) -> None:
    """List dead letters, the oldest first, without their inputs."""
    from gpuinfer.queue.dead import letters

    with _connected(loaded) as client:
        found = letters(client)
    if as_json:
        print_json([letter.to_dict(payload=False) for letter in found])
    elif found:
        print_table(
            ("id", "since", "task", "queue", "deaths", "worker", "reason"), [_row(it) for it in found]
        )
    else:
        click.echo("no dead letters")


def _since(letter: Letter) -> str:
    return datetime.fromtimestamp(letter.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _row(letter: Letter) -> tuple[str, ...]:
    task = letter.task or "unreadable"
    return (letter.id, _since(letter), task, letter.queue, str(letter.deaths), letter.worker, letter.reason)


@dead.command(epilog=examples("gpuinfer dead show 6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21"))
@click.argument("task_id")
@as_json_option
@click.pass_obj
def show(loaded: Loaded, task_id: str, as_json: bool) -> None:
    """Show one dead letter with its inputs."""
    from gpuinfer.queue.dead import get

    with _connected(loaded) as client:
        letter = get(client, task_id)
    body = letter.to_dict(payload=True)
    if as_json:
        print_json(body)
        return
    for key, value in (body | {"at": _since(letter)}).items():
        click.echo(f"{key}: {value}")


def _chosen(client: redis.Redis, task_ids: tuple[str, ...], everything: bool) -> list[str]:
    from gpuinfer.queue.dead import ids

    if everything == bool(task_ids):
        raise UsageError("give task ids, or --all")
    return ids(client) if everything else list(task_ids)


_ids = click.argument("task_ids", nargs=-1, metavar="[TASK_ID]...")
_all = click.option("--all", "everything", is_flag=True, help="All current dead letters.")


@dead.command(epilog=examples("gpuinfer dead retry 6b1f3d0e-...", "gpuinfer dead retry --all"))
@_ids
@_all
@as_json_option
@click.pass_obj
def retry(loaded: Loaded, task_ids: tuple[str, ...], everything: bool, as_json: bool) -> int:
    """Return dead letters to their queues, under the same ids.

    Their count of killed workers starts at zero. A dead letter that cannot be read is refused and kept.
    """
    from gpuinfer.errors import BrokerError
    from gpuinfer.queue.dead import retry as send_again

    outcome: dict[str, GpuinferError | None] = {}
    with _connected(loaded) as client:
        for task_id in _chosen(client, task_ids, everything):
            try:
                send_again(client, task_id)
            except BrokerError:
                raise
            except GpuinferError as exc:
                outcome[task_id] = exc
            else:
                outcome[task_id] = None
    _report(outcome, as_json)
    return next((error.exit_code for error in outcome.values() if error), 0)


def _report(outcome: dict[str, GpuinferError | None], as_json: bool) -> None:
    if as_json:
        retried = [task_id for task_id, error in outcome.items() if error is None]
        refused = {task_id: error.to_dict() for task_id, error in outcome.items() if error}
        click.echo(orjson.dumps({"retried": retried, "refused": refused}, option=orjson.OPT_INDENT_2))
        return
    for task_id, error in outcome.items():
        if error is None:
            click.echo(f"{task_id}: back in its queue")
        else:
            click.echo(f"{task_id}: refused: {error.message}", err=True)
    if not outcome:
        click.echo("no dead letters")


@dead.command(epilog=examples("gpuinfer dead drop 6b1f3d0e-...", "gpuinfer dead drop --all"))
@_ids
@_all
@as_json_option
@click.pass_obj
def drop(loaded: Loaded, task_ids: tuple[str, ...], everything: bool, as_json: bool) -> int:
    """Delete dead letters. Fails if a TASK_ID is not a dead letter."""
    from gpuinfer.queue.dead import drop as delete

    with _connected(loaded) as client:
        wanted = dict.fromkeys(_chosen(client, task_ids, everything))
        dropped = delete(client, wanted)
    if as_json:
        print_json({"dropped": dropped})
    else:
        click.echo(f"{dropped} dropped")
    from gpuinfer.errors import TaskNotFound

    return 0 if everything or dropped == len(wanted) else TaskNotFound.exit_code
