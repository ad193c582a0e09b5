# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer worker N`` and ``gpuinfer restore N``."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded


def node_name(number: int) -> str:
    """Return the name of worker ``number`` on this host."""
    return f"gpu{number}@{socket.gethostname()}"


@click.command(epilog="Example: gpuinfer worker 0")
@click.argument("number", type=click.IntRange(0), metavar="N")
@click.pass_obj
def worker(loaded: Loaded, number: int) -> None:
    """Serve the queue with GPU N: load the model, warm it up, then run until SIGTERM.

    SIGTERM finishes the running batch, hands back the rest and exits 0. A GPU that fails, under a batch
    or while there is none, ends it with 74; one that cannot be used at the start with 69.
    """
    from gpuinfer.worker.app import create_worker_app

    process = create_worker_app(loaded.settings).Worker(
        hostname=node_name(number), pool_cls="solo", without_mingle=True, without_gossip=True, quiet=True
    )
    process.start()
    sys.exit(process.exitcode or 0)


@click.command(epilog="Example: gpuinfer restore 0")
@click.argument("number", type=click.IntRange(0), metavar="N")
@click.pass_obj
def restore(loaded: Loaded, number: int) -> None:
    """Put back what a dead worker N left in flight. Refused while the worker runs."""
    from gpuinfer.log import configure, target
    from gpuinfer.queue.connection import connect, typed_errors
    from gpuinfer.queue.store import Store
    from gpuinfer.worker.lock import stopped

    settings = loaded.settings
    name = node_name(number)
    configure(settings.log, program="gpuinfer-worker", worker=name, gpu=number)
    with stopped(settings.worker.run_dir, name), typed_errors():
        done = Store(connect(settings.broker), name, settings.worker.queues, settings.queue).restore()
    if target(settings.log) != "journal":  # there the line that names the tasks says it
        click.echo(f"{name}: {done.returned} tasks put back, {len(done.dead)} dead letters")
