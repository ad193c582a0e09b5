# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer gpus``: the GPUs of this host, as the workers see them."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from gpuinfer.gpus import Gpu, Inventory, list_gpus
from gpuinfer.settings import Loaded

_MIB = 1024 * 1024


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def gpus(loaded: Loaded, as_json: bool) -> None:
    """List this host's GPUs, each with the worker number it belongs to.

    A host without one is no error: the reason is printed, and the exit code is 0.
    """
    found = list_gpus(loaded.settings.worker.gpus)
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2))
        return
    for number in found.worker_numbers:
        gpu = found.of_worker(number)
        if gpu is not None:
            click.echo(f"worker {number}: {_line(gpu)}")
    if not found.gpus:
        click.echo(f"no GPU: {found.reason}")
    elif found.reason:
        click.echo(f"note: {found.reason}", err=True)


def _as_dict(found: Inventory) -> dict[str, object]:
    workers = [(number, found.of_worker(number)) for number in found.worker_numbers]
    return {
        "source": found.source,
        "reason": found.reason,
        "driver": found.driver,
        "failed": found.failed,
        "gpus": [{"worker": number, **asdict(gpu)} for number, gpu in workers if gpu is not None],
        "broken": {str(index): words for index, words in found.broken.items()},
    }


def _line(gpu: Gpu) -> str:
    memory = f"{gpu.used_bytes // _MIB} of {gpu.memory_bytes // _MIB} MiB used" if gpu.memory_bytes else ""
    parts = [f"GPU {gpu.index}", gpu.name, memory, gpu.pci, gpu.uuid]
    return "  ".join(part for part in parts if part)
