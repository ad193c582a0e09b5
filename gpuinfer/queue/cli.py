# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer queue``."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.queue import control_cli
from gpuinfer.queue.show import as_json_option, one_line, print_json, print_table

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded

_seconds = click.FloatRange(min=0, min_open=True)


@click.group("queue")
def queue() -> None:
    """Show, purge, pause and resume queues."""


for _command in (control_cli.purge, control_cli.pause, control_cli.resume):
    queue.add_command(_command)


@queue.command(epilog=examples("gpuinfer queue status --json", "gpuinfer queue status --watch 2"))
@as_json_option
@click.option("--watch", type=_seconds, metavar="SECONDS", help="Repeat at this interval, until Ctrl-C.")
@click.pass_obj
def status(loaded: Loaded, as_json: bool, watch: float | None) -> None:
    """Show waiting tasks by queue and model, and the workers.

    Also lists waiting tasks that no live worker serves.
    """
    from gpuinfer.broker import durability
    from gpuinfer.queue import heartbeats
    from gpuinfer.queue.catalogue import fleet
    from gpuinfer.queue.connection import connect, typed_errors, user_of
    from gpuinfer.queue.depth import read as read_depth
    from gpuinfer.queue.orphans import holders

    with typed_errors(user_of(loaded.settings.broker)), connect(loaded.settings.broker) as client:
        while True:
            depth, (beats, now) = read_depth(client), heartbeats.read(client)
            body = depth.to_dict() | fleet(depth, heartbeats.alive(beats, now)).to_dict()
            body["silent"] = {one.worker: round(one.silent_s, 1) for one in holders(client) if one.silent}
            # Other users may not ask, and Redis logs each refusal.
            may_ask = user_of(loaded.settings.broker) in ("admin", "default")
            body["durability"] = durability.running(client) if may_ask else None
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
        click.echo(time.strftime("%Y-%m-%d %H:%M:%S %Z\n", time.localtime(now)))
    header = ("queue", "model", "waiting", "later", "by priority", "")
    print_table(header, _queue_rows(body["queues"], body["paused"]))
    click.echo()
    if body["models"]:
        columns = ("model", "default", "workers", "queues served", "last seen")
        print_table(columns, [_model_row(model, now) for model in body["models"]])
    else:
        click.echo("no models are known: no worker has run yet")
    click.echo()
    for key, kind in body["foreign_keys"].items():
        click.echo(
            f"{key!r} is a {kind}, not a queue of gpuinfer: its tasks are not served until you delete the key"
        )
    for model in body["models"]:
        for worker, why in model["missing"].items():
            click.echo(f"{worker} serves without {model['name']}: {why}")
    for unserved in body["unserved"]:
        click.echo(unserved["message"])
    for worker, held in body["in_flight"].items():
        click.echo(f"in flight at {worker}: {held}{_silence(worker, body['silent'].get(worker))}")
    if not body["in_flight"]:
        click.echo("nothing in flight")
    click.echo(f"dead letters: {body['dead_letters']}")
    if body["durability"]:
        click.echo(f"appendfsync {body['durability']['appendfsync']}: {body['durability']['means']}")


def _queue_rows(queues: dict[str, Any], paused: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for each queue and model with tasks that wait, and one for each empty queue."""
    rows: list[tuple[str, ...]] = []
    for name, queue in queues.items():
        halted = {one.partition(".")[2] for one in paused if one.startswith(f"{name}.")}
        models = sorted({*queue["by_model"], *queue["later"], *halted}) or [""]
        for model in models:
            levels, later = queue["by_model"].get(model, {}), queue["later"].get(model, 0)
            by_priority = ", ".join(f"{priority}: {tasks}" for priority, tasks in levels.items())
            state = "paused" if name in paused or model in halted else ""
            rows.append((name, model, str(sum(levels.values())), str(later), by_priority, state))
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
    """Return the words for a worker that holds tasks and sends no heartbeat."""
    from gpuinfer.queue.orphans import ago, command

    if seconds is None:
        return ""
    return f", silent for {ago(seconds)}; {command(worker, socket.gethostname())} puts them back"
