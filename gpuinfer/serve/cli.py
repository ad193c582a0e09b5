# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer serve``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples
from gpuinfer.demo.private import end_in_order

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded


@click.command(
    epilog=examples(
        "gpuinfer serve model.py --reload",
        "gpuinfer serve net.pt --input x:float32:3,224,224",
        "gpuinfer serve digits --port 9000",
    )
)
@click.argument("source", metavar="FOLDER|FILE|NAME")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@click.option("--reload", is_flag=True, help="Load the model anew when one of its files changes.")
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:DTYPE:SHAPE",
    help="An input, where there is no model.toml and the file does not tell.",
)
@click.option("--class", "class_name", help="The class of a Python file that has several.")
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
    """Serve one model here: a private Redis, a worker and the HTTP front, until Ctrl-C.

    A FOLDER is a model, with model.toml or without; a FILE is a Python file with one class (.py), TorchScript
    (.pt) or torch.export (.pt2); a NAME is an installed model, before a folder of that name here, which is
    ./NAME. Nothing is installed: it runs in a temporary folder that is gone in the end, and neither this
    host's gpuinfer nor its Redis is touched.

    It prints a curl command to try, what the model prints, and its errors with file and line. With --reload,
    requests wait while a changed model is loaded. Runs on the first GPU there is, else on the CPU. Root
    becomes the workers' user for it.
    """
    from gpuinfer.demo.screen import console_for
    from gpuinfer.demo.stack import plan
    from gpuinfer.journal.sender import say_warning
    from gpuinfer.models.repository import Repository
    from gpuinfer.models.scaffold import Wanted
    from gpuinfer.models.source import check_readable, find
    from gpuinfer.privileges import leave_root
    from gpuinfer.serve.loop import run

    # A path needs no settings: a developer may have none, or broken ones.
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
