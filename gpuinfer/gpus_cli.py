# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer gpus``: the GPUs of this host, as the workers see them."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from gpuinfer.cli_help import examples
from gpuinfer.gpus import Gpu, Inventory, MigInstance, list_gpus
from gpuinfer.settings import Loaded

_MIB = 1024 * 1024


@click.command(epilog=examples("gpuinfer gpus", "gpuinfer gpus --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def gpus(loaded: Loaded, as_json: bool) -> None:
    """List this host's GPUs with their workers and MIG instances.

    On a host without a GPU the reason is printed, and the exit code is 0.

    \b
    Bind worker 0 to one MIG instance:
      gpuinfer gpus --json | jq -r '.gpus[].instances[].uuid'
      echo CUDA_VISIBLE_DEVICES=MIG-... >> /etc/gpuinfer/worker@0.env
    """
    worker = loaded.settings.worker
    found = list_gpus(worker.gpus, per_gpu=worker.per_gpu)
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2))
        return
    for workers, gpu in _rows(found):
        _show(workers, gpu)
    if not found.gpus:
        click.echo(f"no GPU: {found.reason}")
    elif found.reason:
        click.echo(f"note: {found.reason}", err=True)


def _as_dict(found: Inventory) -> dict[str, object]:
    return {
        "source": found.source,
        "reason": found.reason,
        "driver": found.driver,
        "failed": found.failed,
        "per_gpu": found.per_gpu,
        "gpus": [{"workers": list(workers), **asdict(gpu)} for workers, gpu in _rows(found)],
        "broken": {str(index): words for index, words in found.broken.items()},
    }


def _rows(found: Inventory) -> list[tuple[range, Gpu]]:
    """Return each GPU with the numbers of the workers that share it."""
    numbers = [found.workers_at(place) for place in found.places]
    return [(workers, gpu) for workers in numbers if (gpu := found.of_worker(workers[0])) is not None]


def _show(workers: range, gpu: Gpu) -> None:
    who = f"worker {workers[0]}" if len(workers) == 1 else f"workers {workers[0]}-{workers[-1]}"
    click.echo(f"{who}: {_join(f'GPU {gpu.index}', gpu.name, _memory(gpu), gpu.pci, gpu.uuid)}")
    for instance in gpu.instances:
        click.echo("    " + _join(f"MIG {instance.profile}".strip(), _memory(instance), instance.uuid))
    if gpu.mig and not gpu.instances:
        click.echo("    MIG is on, but there is no instance; to make one: nvidia-smi mig -cgi PROFILE -C")


def _memory(part: Gpu | MigInstance) -> str:
    if not part.memory_bytes:
        return ""
    return f"{part.used_bytes // _MIB} of {part.memory_bytes // _MIB} MiB used"


def _join(*parts: str) -> str:
    return "  ".join(part for part in parts if part)
