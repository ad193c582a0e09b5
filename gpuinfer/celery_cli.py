# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer celery``: Celery's own command, on our application and with its settings."""

from __future__ import annotations

import os
from importlib.util import find_spec

import click

from gpuinfer.cli_help import examples
from gpuinfer.settings import Loaded

_APP = "gpuinfer.celery"


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    epilog=examples("gpuinfer celery inspect ping", "gpuinfer celery status", "gpuinfer celery --help"),
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENT]...")
@click.pass_context
def celery(ctx: click.Context, arguments: tuple[str, ...]) -> int:
    """Run Celery's own command on this application.

    All arguments and options are Celery's.
    """
    from celery.bin.celery import celery as command

    file = ctx.find_root().params.get("file")
    if file is not None:  # the application reads its settings itself
        os.environ["GPUINFER_CONFIG"] = str(file)
    if "flower" in arguments and find_spec("flower") is not None:
        _prepare_flower(ctx.obj)
    code = command.main(["-A", _APP, *arguments], prog_name="gpuinfer celery", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _prepare_flower(loaded: Loaded) -> None:
    """Give Flower our queues, and our log format: it uses the root logger's handler if there is one."""
    from gpuinfer.flower import prepare
    from gpuinfer.log import configure

    configure(loaded.when_written().settings.log, program="gpuinfer-flower")
    prepare()
