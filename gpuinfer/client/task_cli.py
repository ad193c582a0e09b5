# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer task``: look at tasks, send dead letters again, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.client.cli import cancel
from gpuinfer.errors import BrokerError, GpuinferError
from gpuinfer.queue import completion
from gpuinfer.queue.history import MOST, STATUSES, USUAL
from gpuinfer.queue.show import as_json_option, one_line, print_json, print_table

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded

_ID = "6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21"


@click.group("task")
def task() -> None:
    """Look at tasks: what became of one, which have ended; retry and cancel.

    Exit codes: 66 for an id that nothing is known of, or whose result has expired; 69 without Redis.
    """


@task.command(epilog=examples(f"gpuinfer task show {_ID}", f"gpuinfer task show {_ID} --wait 10 --json"))
@click.argument("task_id", shell_complete=completion.from_redis(completion.ended))
@click.option("--wait", "wait_s", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait for its end.")
@as_json_option
@click.pass_obj
def show(loaded: Loaded, task_id: str, wait_s: float | None, as_json: bool) -> int:
    """Show a task: status, model, queue, times, metrics, worker, and its result or error.

    Exit code 0 whatever became of it (gpuinfer result has its error's), 75 when --wait is over first.
    """
    from gpuinfer.client import Client
    from gpuinfer.errors import WaitTimeout

    with Client(loaded.only("broker", "queue")) as client:
        if wait_s:
            client.wait(task_id, wait_s)
        body = client.task(task_id)
    if as_json:
        print_json(body)
    else:
        _print(body)
    return WaitTimeout.exit_code if wait_s and body["status"] in ("queued", "running") else 0


def _print(body: dict[str, Any]) -> None:
    """Print a task for people: a line for each thing that is known."""
    shown = {name: value for name, value in body.items() if name != "urls" and value not in (None, {}, "")}
    width = max(map(len, shown))
    for name, value in shown.items():
        click.echo(f"{name:{width}}  {value if isinstance(value, str) else one_line(value)}")


@task.command(
    "list",
    epilog=examples(
        "gpuinfer task list --status failed",
        "gpuinfer task list --model resnet --limit 20 --json",
        "gpuinfer task list --before 2026-11-28T12:00Z",
    ),
)
@click.option("--status", type=click.Choice(STATUSES), help="Only those that ended so.")
@click.option(
    "--model",
    metavar="NAME",
    help="Only this model's.",
    shell_complete=completion.from_redis(completion.models),
)
@click.option("--before", metavar="TIME", help="Only those that ended before: ISO 8601, or seconds.")
@click.option("--limit", type=click.IntRange(1, MOST), default=USUAL, help=f"How many. Default: {USUAL}.")
@as_json_option
@click.pass_obj
def list_(
    loaded: Loaded, status: str | None, model: str | None, before: str | None, limit: int, as_json: bool
) -> None:
    """List tasks that have ended, the newest first: of the last 10,000, and of up to 100,000 failures of a
    day with --status failed.
    """
    from gpuinfer.client import Client

    with Client(loaded.only("broker", "queue")) as client:
        page = client.tasks(status=status, model=model, before=before, limit=limit)
    if as_json:
        print_json(page.to_dict())
        return
    if not page.tasks:
        click.echo("no such task has ended")
        return
    rows = [
        (one["id"], one["status"], one["queue"] or "", one["model"] or "", one["completed_at"], _code(one))
        for one in (ended.to_dict() for ended in page.tasks)
    ]
    print_table(("id", "status", "queue", "model", "ended", "error"), rows)
    if page.before is not None:
        click.echo(f"more with --before {page.before}")


def _code(one: dict[str, Any]) -> str:
    return str(one.get("error", {}).get("code", ""))


@task.command(epilog=examples(f"gpuinfer task retry {_ID}"))
@click.argument(
    "task_ids",
    nargs=-1,
    required=True,
    metavar="TASK_ID...",
    shell_complete=completion.from_redis(completion.dead),
)
@as_json_option
@click.pass_obj
def retry(loaded: Loaded, task_ids: tuple[str, ...], as_json: bool) -> int:
    """Send dead letters to their queues again, under their ids. gpuinfer dead retry --all takes all.

    Other tasks are refused: their inputs are not kept. The exit code is the first refused one's, else 0.
    """
    from gpuinfer.client import Client

    refused: dict[str, GpuinferError] = {}
    with Client(loaded.only("broker", "queue")) as client:
        for task_id in task_ids:
            try:
                client.retry(task_id)
            except BrokerError:
                raise
            except GpuinferError as exc:
                refused[task_id] = exc
    if as_json:
        sent = [task_id for task_id in task_ids if task_id not in refused]
        print_json({"retried": sent, "refused": {name: exc.to_dict() for name, exc in refused.items()}})
    else:
        for task_id in task_ids:
            error = refused.get(task_id)
            said = "back in its queue" if error is None else f"refused: {error.message}"
            click.echo(f"{task_id}: {said}", err=error is not None)
    return next((error.exit_code for error in refused.values()), 0)


task.add_command(cancel)
