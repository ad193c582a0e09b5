# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer worker N`` (run by its unit), ``list``, ``drain`` and others; ``gpuinfer restore N``."""

from __future__ import annotations

import re
import socket
import sys
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples
from gpuinfer.plural import many
from gpuinfer.queue.show import as_json_option, print_json
from gpuinfer.worker import manage_cli

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded


def node_name(number: int) -> str:
    """Return the name of worker ``number`` on this host."""
    return f"gpu{number}@{socket.gethostname()}"


#: What one might call here, and systemd does.
_OF_SYSTEMD = ("start", "stop", "status", "enable", "disable", "mask", "unmask")


class _WithRun(click.Group):
    """A group with the default command ``run``: ``gpuinfer worker 0`` is ``gpuinfer worker run 0``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in _OF_SYSTEMD:
            number = next((word for word in args[1:] if word.isdecimal()), "N")
            raise click.UsageError(f"a worker is a unit: systemctl {args[0]} gpuinfer-worker@{number}", ctx)
        return super().resolve_command(ctx, ["run", *args] if args[0].isdecimal() else args)


@click.group(
    cls=_WithRun,
    subcommand_metavar="N | COMMAND [ARGS]...",
    epilog=examples("gpuinfer worker 0", "gpuinfer worker list", "gpuinfer worker drain 0 --wait"),
)
def worker() -> None:
    """Run the worker of one GPU; list, drain and restart workers.

    The unit gpuinfer-worker@N runs gpuinfer worker N.
    """


for _command in (manage_cli.list_, manage_cli.drain, manage_cli.resume, manage_cli.restart):
    worker.add_command(_command)


@worker.command(epilog=examples("gpuinfer worker 0", "gpuinfer worker run 0"))
@click.argument("number", type=click.IntRange(0), metavar="N")
@click.pass_obj
def run(loaded: Loaded, number: int) -> None:
    """Run worker N in the foreground, until SIGTERM.

    It uses GPU N // worker.per_gpu, loads its models, warms them up and serves the queues. On SIGTERM it
    finishes the running batch, returns its other tasks to the queue and exits with 0. Exit code 69: the GPU
    is unusable at the start. 74: the GPU failed later. 80: the worker exceeded worker.max_memory_mb and can
    be restarted.
    """
    from gpuinfer.worker.app import create_worker_app

    process = create_worker_app(loaded.when_written().settings).Worker(
        hostname=node_name(number), pool_cls="solo", quiet=True
    )
    process.start()
    sys.exit(process.exitcode or 0)


@click.command(
    epilog=examples(
        "gpuinfer restore 0",
        "gpuinfer restore --name gpu3@old-host",
        "gpuinfer restore --name gpu3@old-host --force",
    )
)
@click.argument("number", type=click.IntRange(0), metavar="[N]", required=False)
@click.option(
    "--name", metavar="gpuN@HOST", help="Name of a worker of another host, or of this host's former name."
)
@click.option(
    "--force", is_flag=True, help="Even if its last heartbeat is recent. Does not stop a running worker."
)
@as_json_option
@click.pass_obj
def restore(loaded: Loaded, number: int | None, name: str | None, *, force: bool, as_json: bool) -> None:
    """Return a dead worker's tasks to their queues.

    N is a stopped worker of this host. Use --name for a worker whose host is lost; gpuinfer worker list shows
    the names. Exit code 73: the worker runs, or may run; nothing was changed.
    """
    from gpuinfer.log import configure, target
    from gpuinfer.worker.restoring import put_back

    if number is not None and name is None:
        worker = node_name(number)
    elif name is not None and number is None:
        worker = _checked(name)
    else:
        raise click.UsageError("give either N or --name")
    settings = loaded.when_written().settings
    configure(
        settings.log, program="gpuinfer-worker", worker=worker, gpu=_gpu_of(worker, settings.worker.per_gpu)
    )
    done = put_back(settings, worker, force=force)
    if as_json:
        print_json(
            {"worker": worker, "returned": done.returned, "task_ids": list(done.ids), "dead": list(done.dead)}
        )
    elif target(settings.log) != "journal":  # the journal's log line lists the tasks already
        click.echo(f"{worker}: {many(done.returned, 'task')} put back, {many(len(done.dead), 'dead letter')}")
        for task_id in done.ids:
            click.echo(f"  put back     {task_id}")
        for task_id in done.dead:
            click.echo(f"  dead letter  {task_id}")


def _gpu_of(worker: str, per_gpu: int) -> int:
    return int(worker.partition("@")[0].removeprefix("gpu")) // per_gpu


def _checked(name: str) -> str:
    """Return the name if it is valid. Raises click's UsageError."""
    if not re.fullmatch(r"gpu\d+@[^\s@]+", name):
        raise click.UsageError(f"--name {name}: must be a number and a host, such as gpu0@host-1")
    return name
