# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer gpus``: the GPUs of this host, as the workers see them."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from gpuinfer.gpus import Gpu, Inventory, MigInstance, list_gpus
from gpuinfer.settings import Loaded

_MIB = 1024 * 1024


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def gpus(loaded: Loaded, as_json: bool) -> None:
    """List this host's GPUs, each with the worker number it belongs to, and their MIG instances.

    A host without one is no error: the reason is printed, and the exit code is 0.

    \b
    Bind worker 0 to one MIG instance:
      gpuinfer gpus --json | jq -r '.gpus[].instances[].uuid'
      echo CUDA_VISIBLE_DEVICES=MIG-... >> /etc/gpuinfer/worker@0.env
    """
    found = list_gpus(loaded.settings.worker.gpus)
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2))
        return
    for number in found.worker_numbers:
        gpu = found.of_worker(number)
        if gpu is not None:
            _show(number, gpu)
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


def _show(number: int, gpu: Gpu) -> None:
    click.echo(f"worker {number}: {_join(f'GPU {gpu.index}', gpu.name, _memory(gpu), gpu.pci, gpu.uuid)}")
    for instance in gpu.instances:
        click.echo("    " + _join(f"MIG {instance.profile}".strip(), _memory(instance), instance.uuid))
    if gpu.mig and not gpu.instances:
        click.echo("    MIG is on, and there is no instance: nvidia-smi mig -cgi PROFILE -C makes one")


def _memory(part: Gpu | MigInstance) -> str:
    if not part.memory_bytes:
        return ""
    return f"{part.used_bytes // _MIB} of {part.memory_bytes // _MIB} MiB used"


def _join(*parts: str) -> str:
    return "  ".join(part for part in parts if part)
