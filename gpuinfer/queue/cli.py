# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer submit``, ``result``, ``cancel`` and ``queue``."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.errors import TaskRevoked, WaitTimeout
from gpuinfer.queue.show import as_json_option, one_line, print_json, print_table
from gpuinfer.settings import QUEUES

if TYPE_CHECKING:
    from gpuinfer.queue.client import Client
    from gpuinfer.queue.results import TaskStatus
    from gpuinfer.settings import Loaded

_ID = "6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21"
_seconds = click.FloatRange(min=0, min_open=True)


@click.command(
    epilog="Examples: gpuinfer submit --wait '[[[0, 5, 13, 9, 1, 0, 0, 0], ...]]'; "
    "gpuinfer submit --batch --queue batch images.npy; cat three.json | gpuinfer submit -"
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--model", help="Default: the fleet's default model.")
@click.option("--queue", type=click.Choice(QUEUES), help="Default: realtime; batch with --batch.")
@click.option("--priority", type=click.IntRange(0, 9), default=0, help="9 runs first. Default: 0.")
@click.option("--batch", is_flag=True, help="Submit all inputs as one job; a single INPUT holds their list.")
@click.option("--top-k", type=click.IntRange(1), help="How many classes to name.")
@click.option("--encoding", type=click.Choice(["list", "b64"]), help="How raw outputs are returned.")
@click.option("--expires", "expires_s", type=_seconds, help="Seconds after which it must not begin any more.")
@click.option("--soft-time-limit", "soft_time_limit_s", type=_seconds, help="Seconds. Default: the model's.")
@click.option("--time-limit", "time_limit_s", type=_seconds, help="Seconds. Default: the model's.")
@click.option("--ignore-result", is_flag=True, help="Run it and keep nothing.")
@click.option("--idempotency-key", metavar="KEY", help="The same key gives the same task.")
@click.option("--wait/--no-wait", help="Wait for the results and print them. Default: print the task ids.")
@click.option("--timeout", type=_seconds, default=60.0, help="Longest wait in seconds. Default: 60.")
@as_json_option
@click.pass_obj
def submit(
    loaded: Loaded,
    /,
    inputs: tuple[str, ...],
    batch: bool,
    wait: bool,
    timeout: float,
    as_json: bool,
    **given: Any,
) -> int:
    """Submit each INPUT as a task: JSON text, a .json or .npy file, or - for JSON on standard input.

    With --wait, ends with the exit code of the first task that failed, or 75 when the time is over.
    """
    from gpuinfer.queue.client import Client
    from gpuinfer.queue.inputs import read_batch, read_input
    from gpuinfer.queue.submission import Options

    options: Options = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]  # click's names are theirs
    with Client(loaded.settings) as client:
        if batch:
            ids = [client.submit_batch(read_batch(inputs), **options)]
        elif len(inputs) == 1:
            ids = [client.submit(read_input(inputs[0]), **options)]
        else:
            ids = client.submit_many([read_input(argument) for argument in inputs], **options)
        if wait and not options.get("ignore_result"):
            return _show(_ended(client, ids, timeout), as_json)
    if as_json:
        print_json({"task_ids": ids})
    else:
        click.echo("\n".join(ids))
    return 0


def _ended(client: Client, ids: Sequence[str], timeout_s: float) -> list[TaskStatus]:
    """Wait for tasks; return their states in order, those that have not ended in time too."""
    found = {}
    try:
        for status in client.as_completed(ids, timeout_s):
            found[status.id] = status
    except WaitTimeout:
        pass
    return [found.get(task_id) or client.status(task_id) for task_id in ids]


def _show(statuses: Sequence[TaskStatus], as_json: bool) -> int:
    """Print waited-for tasks; return the exit code."""
    if as_json:
        print_json([status.to_dict() for status in statuses])
    else:
        for status in statuses:
            click.echo(f"{status.id}  {_words(status)}")
    return next((code for status in statuses if (code := _exit_code(status, waited=True))), 0)


def _words(status: TaskStatus) -> str:
    if status.state == "completed":
        return one_line(status.result)
    return f"{status.state}: {status.error} ({status.error.code})" if status.error else status.state


def _exit_code(status: TaskStatus, *, waited: bool) -> int:
    if status.error is not None:
        return status.error.exit_code
    return WaitTimeout.exit_code if waited and not status.final else 0


@click.command(epilog=f"Example: gpuinfer result {_ID} --wait 10")
@click.argument("task_id")
@click.option("--wait", "wait_s", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait for its end.")
@as_json_option
@click.pass_obj
def result(loaded: Loaded, task_id: str, wait_s: float | None, as_json: bool) -> int:
    """Print the result of a task, or its state while it waits or runs.

    A failed task's error goes to standard error and gives the exit code; 66: no such task.
    """
    from gpuinfer.queue.client import Client

    with Client(loaded.settings) as client:
        status = _ended(client, [task_id], wait_s)[0] if wait_s else client.status(task_id)
    if as_json:
        print_json(status.to_dict())
    else:
        click.echo(_words(status), err=status.error is not None)
    return _exit_code(status, waited=wait_s is not None)


@click.command(epilog=f"Example: gpuinfer cancel {_ID}")
@click.argument("task_ids", nargs=-1, required=True, metavar="TASK_ID...")
@as_json_option
@click.pass_obj
def cancel(loaded: Loaded, task_ids: tuple[str, ...], as_json: bool) -> int:
    """Cancel tasks that no worker has begun. Exit code 1 when one had begun or ended already."""
    from gpuinfer.queue.client import Client

    states: dict[str, str] = {}
    with Client(loaded.settings) as client:
        for task_id in task_ids:
            client.cancel(task_id)
            states[task_id] = client.status(task_id).state
    if as_json:
        print_json([{"task_id": task_id, "status": state} for task_id, state in states.items()])
    else:
        for task_id, state in states.items():
            click.echo(f"{task_id}: {'cancelled' if state == 'revoked' else f'not cancelled, it is {state}'}")
    return 0 if set(states.values()) == {"revoked"} else TaskRevoked.exit_code


@click.group("queue")
def queue() -> None:
    """Look at the queues."""


@queue.command(epilog="Examples: gpuinfer queue status --json; gpuinfer queue status --watch 2")
@as_json_option
@click.option(
    "--watch", type=_seconds, metavar="SECONDS", help="Look again and again, at this interval, until Ctrl-C."
)
@click.pass_obj
def status(loaded: Loaded, as_json: bool, watch: float | None) -> None:
    """Show what waits in each queue and for which model, who serves it, and what each worker holds.

    What waits for a model or queue that no live worker serves is named.
    """
    from gpuinfer.queue import heartbeats
    from gpuinfer.queue.catalogue import fleet
    from gpuinfer.queue.connection import connect, typed_errors
    from gpuinfer.queue.depth import look
    from gpuinfer.queue.orphans import holders

    with typed_errors(), connect(loaded.settings.broker) as client:
        while True:
            depth, (beats, now) = look(client), heartbeats.read(client)
            body = depth.to_dict() | fleet(depth, heartbeats.alive(beats, now)).to_dict()
            body["silent"] = {one.worker: round(one.silent_s, 1) for one in holders(client) if one.silent}
            if as_json:
                click.echo(one_line(body)) if watch else print_json(body)
            else:
                _print_status(body, now, clear=watch is not None)
            if watch is None:
                return
            time.sleep(watch)


def _print_status(body: dict[str, Any], now: float, *, clear: bool) -> None:
    if clear:
        click.clear()
    print_table(("queue", "model", "waiting", "by priority"), _queue_rows(body["queues"]))
    click.echo()
    if body["models"]:
        header = ("model", "default", "workers", "queues served", "last seen")
        print_table(header, [_model_row(model, now) for model in body["models"]])
    else:
        click.echo("no model is known: no worker has run yet")
    click.echo()
    for unserved in body["unserved"]:
        click.echo(unserved["message"])
    for worker, held in body["in_flight"].items():
        click.echo(f"in flight at {worker}: {held}{_silence(worker, body['silent'].get(worker))}")
    if not body["in_flight"]:
        click.echo("nothing in flight")
    click.echo(f"dead letters: {body['dead_letters']}")


def _queue_rows(queues: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each queue and model with tasks that wait, and one for each empty queue."""
    rows: list[tuple[str, ...]] = []
    for name, queue in queues.items():
        for model, levels in (queue["by_model"] or {"": {}}).items():
            by_priority = ", ".join(f"{priority}: {tasks}" for priority, tasks in levels.items())
            rows.append((name, model, str(sum(levels.values())), by_priority))
    return rows


def _model_row(model: dict[str, Any], now: float) -> tuple[str, ...]:
    from gpuinfer.queue.orphans import ago

    seen = model["last_seen"]
    return (
        model["name"],
        "yes" if model["default"] else "",
        str(model["workers"]) if model["serving"] else "none",
        ", ".join(model["queues"]),
        "never" if seen is None else f"{ago(max(0.0, now - datetime.fromisoformat(seen).timestamp()))} ago",
    )


def _silence(worker: str, seconds: float | None) -> str:
    """Return what to say of a worker that holds tasks and sends no heartbeat."""
    from gpuinfer.queue.orphans import ago, command

    if seconds is None:
        return ""
    return f", silent for {ago(seconds)}; {command(worker, socket.gethostname())} puts them back"
