# SPDX-License-Identifier: Apache-2.0
"""The command ``gpuinfer serve``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples
from gpuinfer.models import completion

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded


@click.command(
    epilog=examples(
        "gpuinfer serve model.py --reload",
        "gpuinfer serve net.pt --input x:float32:3,224,224",
        "gpuinfer serve digits --port 9000",
    )
)
@click.argument("source", metavar="FOLDER|FILE|NAME", shell_complete=completion.names_or_files)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0: any free one."
)
@click.option("--reload", is_flag=True, help="Reload the model when one of its files changes.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu"]),
    default="auto",
    show_default=True,
    help="auto: the first GPU, or the CPU on a host without one.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:DTYPE:SHAPE",
    help="Describe an input that neither model.toml nor the file describes.",
)
@click.option("--class", "class_name", metavar="NAME", help="The class to use, if a Python file has several.")
@click.pass_obj
def serve(
    loaded: Loaded,
    source: str,
    port: int,
    reload: bool,
    device: str,
    inputs: tuple[str, ...],
    class_name: str | None,
) -> None:
    """Serve one model from its file or folder, until Ctrl-C.

    A private Redis, a worker and the HTTP API run in a temporary folder, which is deleted at the end.
    Nothing is installed, and this host's gpuinfer and Redis are not changed. FOLDER is a model, with or
    without model.toml. FILE is a Python file with one class (.py), TorchScript (.pt) or torch.export (.pt2).
    NAME is an installed model; write ./NAME for a folder of that name here.

    The command prints a curl command to try, the model's output, and its errors with file and line. With
    --reload, requests wait while a changed model is loaded. Started by root, it runs as the workers' user.
    """
    from gpuinfer.demo.private import end_in_order
    from gpuinfer.demo.screen import console_for
    from gpuinfer.demo.stack import plan
    from gpuinfer.journal.sender import say_warning
    from gpuinfer.models.repository import Repository
    from gpuinfer.models.scaffold import Wanted
    from gpuinfer.models.source import check_readable, find
    from gpuinfer.privileges import leave_root
    from gpuinfer.serve.loop import run

    # Settings are only read for an installed model's name: a developer may have none, or broken ones.
    wanted = Wanted(inputs=inputs, class_name=class_name)
    found = find(source, lambda: Repository(loaded.settings.models.folders), wanted)
    leave_root(say_warning)
    check_readable(found)
    end_in_order()
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    devices = plan(1, environment)
    console = console_for(to_stderr=False)
    if devices.note and device == "auto":
        console.print(f"note: {devices.note}", style="yellow", markup=False)
    run(found, devices, console, port, reload=reload)
