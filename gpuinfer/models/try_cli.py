# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer model check``, ``run`` and ``bench``: try a model without a queue, installed or not."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import GpuinferError, UsageError
from gpuinfer.journal.sender import say_warning
from gpuinfer.models import completion, tables

if TYPE_CHECKING:
    from gpuinfer.models.loaded import LoadedModel
    from gpuinfer.models.repository import ModelFolder
    from gpuinfer.models.tensors import Encoding
    from gpuinfer.settings import Loaded

#: Maximum characters of a result that check prints.
_SHOWN = 200
_target = click.argument("target", metavar="NAME|PATH", shell_complete=completion.names_or_files)
gpu_option = click.option(
    "--gpu", type=click.IntRange(0), metavar="N", help="Run it on this GPU instead of the CPU."
)


def device_of(loaded: Loaded, gpu: int | None) -> tuple[str, int | None]:
    """Return torch's device and the GPU's number; the CPU (and None) while a worker holds the GPU."""
    if gpu is None:
        return "cpu", None
    from gpuinfer import locks

    name = f"gpu{gpu}@{socket.gethostname()}"
    if locks.state(loaded.settings.worker.run_dir, name) == "held":
        say_warning(f"GPU {gpu} is used by a worker: the model runs on the CPU instead")
        return "cpu", None
    return "cuda", gpu


def warn(report: Mapping[str, Any]) -> None:
    """Print the warnings of a trial."""
    for text in report.get("warnings", ()):
        say_warning(text)
    for one in report.get("differences", ()):
        say_warning(one["message"])


@contextmanager
def placed(loaded: Loaded, target: str) -> Iterator[Path]:
    """Yield a model's folder for the sandbox: the installed one, one made of links, or for root a copy."""
    from gpuinfer.models import sandbox
    from gpuinfer.models.scaffold import Wanted
    from gpuinfer.models.source import find

    source = find(target, lambda: tables.repository(loaded), Wanted())
    if source.installed:
        yield source.path
    elif sandbox.confined():
        with tables.repository(loaded).copied(source.path, source.write_manifest) as staged:
            yield staged
    else:
        with TemporaryDirectory(prefix="gpuinfer-try-") as scratch:
            yield source.link(Path(scratch)).path


@click.command(
    epilog=examples(
        "gpuinfer model check digits",
        "gpuinfer model check ./ocr --gpu 0",
        "gpuinfer model check model.py --json",
    )
)
@_target
@gpu_option
@tables.as_json_option
@click.pass_obj
def check(loaded: Loaded, target: str, gpu: int | None, as_json: bool) -> None:
    """Load a model and run its example, twice alone and in a batch.

    NAME is an installed model, PATH a folder or a file. It runs in the workers' sandbox. The command warns
    where the results differ. Exit code 65: the model cannot be loaded, or fails on its example.
    """
    from gpuinfer.models import sandbox

    device, number = device_of(loaded, gpu)
    with placed(loaded, target) as folder:
        threads = loaded.settings.worker.threads
        report = sandbox.ask("attempt", gpu=number, folder=str(folder), device=device, threads=threads)
    if as_json:
        tables.print_json(report)
        return
    click.echo(
        f"{report['model']} on {report['device']}: loaded in {report['load_ms']:.0f} ms, warmed up in "
        f"{report['warm_up_ms']:.0f} ms, batches of up to {report['max_batch_size']}"
    )
    for one in report["signature"]["inputs"]:
        known = (str(one[key]) for key in ("dtype", "shape") if key in one)
        click.echo(f"input {one['name']}: {' '.join((one['kind'], *known))}")
    if report["example"] is None:
        say_warning("there is no example that it accepts: it was loaded, but not run")
    else:
        click.echo(f"its example ran in {report['example_ms']:.2f} ms and gave {_short(report['result'])}")
    warn(report)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


@click.command(
    epilog=examples("gpuinfer model bench digits", "gpuinfer model bench ./ocr --gpu 0 --seconds 5")
)
@_target
@gpu_option
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds to run each batch size.",
)
@tables.as_json_option
@click.pass_obj
def bench(loaded: Loaded, target: str, gpu: int | None, seconds: float, as_json: bool) -> None:
    """Measure a model's example in batches of 1, 2, 4 and so on.

    It runs in the workers' sandbox, without a queue.
    """
    from rich.table import Table

    from gpuinfer.models import sandbox

    device, number = device_of(loaded, gpu)
    with placed(loaded, target) as folder:
        threads = loaded.settings.worker.threads
        report = sandbox.ask(
            "bench", gpu=number, folder=str(folder), device=device, threads=threads, seconds=seconds
        )
    if as_json:
        tables.print_json(report)
        return
    click.echo(f"{report['model']} on {report['device']}, one batch after another")
    table = Table("batch", "items/s", "prepare ms", "device ms", "finish ms", box=None, header_style="bold")
    for row in report["batches"]:
        parts = (f"{row[key]:.2f}" for key in ("prepare_ms", "device_ms", "finish_ms"))
        table.add_row(str(row["batch"]), f"{row['items_per_s']:,.0f}", *parts)
    tables.console().print(table)


@click.command(
    epilog=examples(
        "gpuinfer model run digits --input three.png",
        "gpuinfer model run model.py",
        "echo '[[[0, 5, 13, 9, 1, 0, 0, 0], ...]]' | gpuinfer model run digits --input - --json",
    )
)
@_target
@click.option(
    "--input",
    "sources",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="A file: .json (the `inputs` of a request), .npy (one item, or a batch), .txt, an image, a sound; "
    "- is JSON from standard input. Several files make one batch. Default: its example, or what its warm-up "
    "uses.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: worker.device.")
@click.option("--top-k", type=click.IntRange(min=1), help="Number of best classes to print.")
@click.option("--encoding", type=click.Choice(["list", "b64", "raw"]), default="list", show_default=True)
@tables.as_json_option
@click.pass_obj
def run(
    loaded: Loaded,
    target: str,
    sources: tuple[Path, ...],
    device: str | None,
    top_k: int | None,
    encoding: Encoding,
    as_json: bool,
) -> None:
    """Run a model in this process, without a queue.

    NAME is an installed model, PATH a folder or a file. Started by root, it runs as the workers' user.
    """
    from gpuinfer.models.given import values_in
    from gpuinfer.models.scaffold import Wanted
    from gpuinfer.models.source import check_readable, find
    from gpuinfer.privileges import leave_root

    settings = loaded.settings  # read as root, as the worker's user may not read the files
    source = find(target, lambda: tables.repository(loaded), Wanted())
    read = {path: path.read_bytes() for path in sources if str(path) != "-"}
    leave_root(say_warning)
    check_readable(source)
    with TemporaryDirectory(prefix="gpuinfer-try-") as scratch:
        folder = source.installed or source.link(Path(scratch))
        values = [
            (value, path) for path in sources for value in values_in(folder.manifest, path, read.get(path))
        ]
        report = _run(
            folder, values, device or settings.worker.device, settings.worker.threads, top_k, encoding
        )
    if as_json:
        tables.print_json(report)
        return
    for result in report["results"]:
        tables.print_result(result)
    timing = report["timing_ms"]
    where = f"{report['model']} on {report['device']}, batch of {len(report['results'])}"
    click.echo(f"{where}: {timing['inference']:.2f} ms, after {timing['load']:.0f} ms to load and warm up")


def _run(
    folder: ModelFolder,
    values: Sequence[tuple[Any, Path]],
    device: str,
    threads: int,
    top_k: int | None,
    encoding: Encoding,
) -> dict[str, Any]:
    if device != "cpu":
        from gpuinfer.gpu_binding import check_visible

        check_visible(os.environ)  # before torch is imported, which would silently use the CPU
    # Imported here, as torch takes seconds to import, and only this command needs it.
    from gpuinfer.models.device import pick_device
    from gpuinfer.models.loader import load

    begin = time.perf_counter()
    device = pick_device(device)
    model = load(folder, device, threads=threads)
    largest = model.warm_up(min(max(1, len(values)), folder.manifest.max_batch_size))
    warm = time.perf_counter()
    items = _prepared(model, values)
    outputs = [one for at in range(0, len(items), largest) for one in model.forward(items[at : at + largest])]
    done = time.perf_counter()
    results = model.finish(outputs, top_k=[top_k] * len(items), encoding=[encoding] * len(items))
    for one in (*outputs, *results):
        if isinstance(one, Exception):
            raise one
    return {
        "model": folder.manifest.name,
        "device": device,
        "results": results,
        "timing_ms": {"load": round((warm - begin) * 1e3, 3), "inference": round((done - warm) * 1e3, 3)},
    }


def _prepared(model: LoadedModel, values: Sequence[tuple[Any, Path]]) -> list[Any]:
    """Return the items of values, or of warm-up's input. Raises the first error, naming its file."""
    if not values:
        if model.taken is None:
            raise UsageError(f"{model.name} has no example that it accepts; use --input FILE", "--input")
        values = [(model.taken, Path("its example"))]
    items = model.prepare([value for value, _ in values])
    for item, (_, path) in zip(items, values, strict=True):
        if isinstance(item, GpuinferError):
            raise type(item)(f"{item.field}: {item.message}" if item.field else item.message, str(path))
        if isinstance(item, Exception):
            raise item
    return items
