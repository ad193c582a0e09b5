# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer task``: show, list, retry and cancel tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.client.cli import cancel
from gpuinfer.errors import BrokerError, GpuinferError
from gpuinfer.queue import completion
from gpuinfer.queue.history import MOST, STATUSES, USUAL
from gpuinfer.queue.show import as_json_option, as_usage, one_line, print_json, print_table

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded

_ID = "6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21"


@click.group("task")
def task() -> None:
    """Show, list, retry and cancel tasks.

    Exit code 66: the id is unknown or its result has expired. 69: Redis does not answer.
    """


@task.command(epilog=examples(f"gpuinfer task show {_ID}", f"gpuinfer task show {_ID} --wait 10 --json"))
@click.argument("task_id", shell_complete=completion.from_redis(completion.ended))
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait at most this long for the task to end.",
)
@as_json_option
@click.pass_obj
def show(loaded: Loaded, task_id: str, wait_s: float | None, as_json: bool) -> int:
    """Show a task: status, times, worker, and result or error.

    The exit code is 0 for a failed task, too (gpuinfer result exits with the code of its error). 75: the task
    did not end within --wait.
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
    """Print one line for each known field of a task."""
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
@click.option("--status", type=click.Choice(STATUSES), help="Only tasks with this status.")
@click.option(
    "--model",
    metavar="NAME",
    help="Only tasks of this model.",
    shell_complete=completion.from_redis(completion.models),
)
@click.option("--before", metavar="TIME", help="Only tasks that ended before this: ISO 8601 or Unix time.")
@click.option(
    "--limit", type=click.IntRange(1, MOST), default=USUAL, help=f"Maximum number of tasks. Default: {USUAL}."
)
@as_json_option
@click.pass_obj
def list_(
    loaded: Loaded, status: str | None, model: str | None, before: str | None, limit: int, as_json: bool
) -> None:
    """List tasks that have ended, the newest first.

    The last 10,000 tasks are listed; with --status failed, up to 100,000 of the last day.
    """
    from gpuinfer.client import Client

    with Client(loaded.only("broker", "queue")) as client, as_usage():
        page = client.tasks(status=status, model=model, before=before, limit=limit)
    if as_json:
        print_json(page.to_dict())
        return
    if not page.tasks:
        click.echo("no matching task has ended")
        return
    rows = [
        (one["id"], one["status"], one["queue"] or "", one["model"] or "", one["completed_at"], _code(one))
        for one in (ended.to_dict() for ended in page.tasks)
    ]
    print_table(("id", "status", "queue", "model", "ended", "error"), rows)
    if page.before is not None:
        click.echo(f"for older tasks: --before {page.before}")


def _code(one: dict[str, Any]) -> str:
    return str(one.get("error", {}).get("code", ""))


@task.command(epilog=examples(f"gpuinfer task retry {_ID}"))
@click.argument(
    "task_ids",
    nargs=-1,
    required=True,
    metavar="TASK_ID...",
    shell_complete=completion.from_redis(completion.failed),
)
@as_json_option
@click.pass_obj
def retry(loaded: Loaded, task_ids: tuple[str, ...], as_json: bool) -> int:
    """Run failed tasks and dead letters again, under the same ids.

    The inputs of a failed task are kept for a day (queue.failed_ttl_s), up to queue.max_failed tasks and
    queue.max_failed_bytes. Other tasks are refused. The exit code is that of the first refusal, else 0. To
    retry all dead letters, use gpuinfer dead retry --all.
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
