# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer model``: add, list, show, verify, remove, set the default, and run without a queue."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuinfer.errors import GpuinferError, InputError, ModelError, UsageError
from gpuinfer.gpus import check_visible
from gpuinfer.journal.sender import say_warning
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.record import checked_digest
from gpuinfer.models.repository import Entry, ModelFolder, Repository, verify
from gpuinfer.models.tensors import Encoding, Item, decode_batch
from gpuinfer.privileges import leave_root
from gpuinfer.settings import Loaded

#: Width of tables where the output is no terminal, so that a pipe gets whole lines.
_PIPE_WIDTH = 200
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def _repository(loaded: Loaded) -> Repository:
    return Repository(loaded.settings.models.folders)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


@click.group("model")
def model() -> None:
    """Install models, look at them, and try them out.

    A model is a folder with model.toml and one artefact: TorchScript (.pt) or torch.export (.pt2).
    """


@model.command(epilog="Example: gpuinfer model add ./resnet18 --name resnet")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="Call it so, instead of by the name in its manifest.")
@click.option("--force", is_flag=True, help="Replace a model of that name.")
@click.option("--expect", metavar="DIGEST", help="Add it with this digest only; an add prints it.")
@click.pass_obj
def add(loaded: Loaded, source: Path, name: str | None, force: bool, expect: str | None) -> None:
    """Copy the model folder SOURCE into the first of models.folders, and record the digest of all its files.

    A model is a program: it runs with the worker's rights. Add only what you trust.
    """
    folder = _repository(loaded).add(source, name, force, expect=expect and checked_digest(expect))
    click.echo(f"added {folder.manifest.name} to {folder.path}")
    if folder.record:
        click.echo(folder.record.digest)


@model.command("list", epilog="Example: gpuinfer model list --json")
@_as_json
@click.pass_obj
def list_(loaded: Loaded, as_json: bool) -> None:
    """List installed models, those with a broken manifest too."""
    entries = _repository(loaded).entries()
    if as_json:
        _print_json([_entry_json(entry) for entry in entries])
        return
    table = Table("name", "format", "batch", "inputs", "outputs", "from", box=None, header_style="bold")
    for entry in entries:
        table.add_row(*map(Text, _entry_row(entry)))
    _console().print(table)


def _entry_json(entry: Entry) -> dict[str, Any]:
    body: dict[str, Any] = {"name": entry.name, "path": str(entry.path)}
    if entry.folder is None:
        return {**body, "error": str(entry.error)}
    manifest = entry.folder.manifest
    return {
        **body,
        "format": manifest.format,
        "description": manifest.description,
        "shipped": entry.folder.shipped,
        "batchable": manifest.batchable,
        "max_batch_size": manifest.max_batch_size,
    }


def _entry_row(entry: Entry) -> list[str]:
    if entry.folder is None:
        return [entry.name, "broken", "", str(entry.error), "", str(entry.path.parent)]
    manifest = entry.folder.manifest
    return [
        entry.name,
        manifest.format,
        str(manifest.max_batch_size) if manifest.batchable else "none",
        ", ".join(f"{i.name} {i.dtype}{list(i.shape)}" for i in manifest.inputs),
        ", ".join(f"{o.name} ({o.kind})" for o in manifest.outputs),
        "shipped" if entry.folder.shipped else str(entry.path.parent),
    ]


@model.command(epilog="Example: gpuinfer model show digits")
@click.argument("name")
@_as_json
@click.pass_obj
def show(loaded: Loaded, name: str, as_json: bool) -> None:
    """Show everything the manifest of NAME says, defaults included."""
    folder = _repository(loaded).get(name)
    body = {
        **folder.manifest.model_dump(mode="json", by_alias=True),
        "format": folder.manifest.format,
        "path": str(folder.path),
        "shipped": folder.shipped,
        "digest": folder.record.digest if folder.record else None,
        "added_at": folder.record.added_at if folder.record else None,
    }
    if as_json:
        _print_json(body)
        return
    table = Table("key", "value", box=None, show_header=False)
    for key, value in body.items():
        table.add_row(key, Text(json.dumps(value)))
    _console().print(table)


@model.command("verify", epilog="Example: gpuinfer model verify digits")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_as_json
@click.pass_obj
def verify_(loaded: Loaded, names: tuple[str, ...], as_json: bool) -> None:
    """Check models' files against the digest they were added with; without a NAME, all models.

    All are checked, then the command fails if one was wrong.
    """
    repository = _repository(loaded)
    checked = {name: _verified(repository, name) for name in names or [e.name for e in repository.entries()]}
    if as_json:
        _print_json(
            [{"name": n, "ok": not isinstance(r, ModelError), "detail": str(r)} for n, r in checked.items()]
        )
    else:
        for name, result in checked.items():
            click.echo(f"{name}: {'FAILED, ' if isinstance(result, ModelError) else 'OK, '}{result}")
    for result in checked.values():
        if isinstance(result, ModelError):
            raise result


def _verified(repository: Repository, name: str) -> str | ModelError:
    try:
        return verify(repository.get(name))
    except ModelError as exc:
        return exc


@model.command(
    epilog="Examples: gpuinfer model remove resnet; gpuinfer model remove resnet --forget  # of another host"
)
@click.argument("name")
@click.option("--forget", is_flag=True, help="Delete no files; only make the fleet forget the name.")
@click.pass_obj
def remove(loaded: Loaded, name: str, forget: bool) -> None:
    """Delete the model NAME of this host, and drop it from the fleet's catalogue.

    The fleet then refuses requests for it. Workers that have it loaded keep it until they are restarted; as
    long as one of them lives, the name stays in the catalogue. Without Redis the files go all the same.
    """
    if not forget:
        click.echo(f"removed {_repository(loaded).remove(name)}")
    try:
        said = _forgotten(loaded, name)
    except GpuinferError as exc:
        if forget:
            raise
        said = f"the catalogue is unchanged ({exc.message}); the name goes after seven unseen days"
    click.echo(said)


def _forgotten(loaded: Loaded, name: str) -> str:
    """Drop a model from the catalogue unless it is in use; return what came of it."""
    from gpuinfer.queue import catalogue, keys
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    with typed_errors(user_of(loaded.settings.broker)), connect(loaded.settings.broker) as client:
        workers = catalogue.servers(client, name)
        if workers:
            return (
                f"{name} is in use by {', '.join(workers)}: it stays in the catalogue while they serve it. "
                f"Restart them without it, then run gpuinfer model remove {name} --forget"
            )
        there = catalogue.forget(client, name)
        said = f"{name} is {'no longer' if there else 'not'} in the fleet's catalogue"
        if catalogue.default_model(client) == name:
            said += "; it is still the default model, see gpuinfer model default"
        state = catalogue.read(client).models.get(name)
        for queue, count in state.waiting.items() if state else ():
            tasks = "1 task waits" if count == 1 else f"{count:,} tasks wait"
            said += f"; {tasks} for it, see gpuinfer queue purge {keys.queue_name(queue, name)}"
        return said


@model.command(epilog="Examples: gpuinfer model default; gpuinfer model default resnet")
@click.argument("name", required=False)
@click.option("--force", is_flag=True, help="Take a NAME that the fleet does not know.")
@_as_json
@click.pass_obj
def default(loaded: Loaded, name: str | None, force: bool, as_json: bool) -> None:
    """Print the fleet's default model, or make NAME the default: the model of requests that name none.

    It is one entry in Redis, for all hosts. Clients notice a change within five seconds. What waits is kept:
    tasks that name a model go to that model's workers, also those that wait in the default model's queues;
    tasks of plain Celery producers that name none are for the new default.
    """
    from gpuinfer.models.manifest import MODEL_NAME
    from gpuinfer.queue import catalogue
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    if name is not None and not MODEL_NAME.fullmatch(name):
        raise UsageError(f"a model cannot be called {name!r}; use a-z 0-9 _ . -", "NAME")
    with typed_errors(user_of(loaded.settings.broker)), connect(loaded.settings.broker) as client:
        if name is None:
            found = catalogue.default_model(client)
            body, said = {"default": found}, found or "no default model is set; the first worker sets it"
        else:
            before = catalogue.set_default(client, name, force=force)
            was = f", it was {before}" if before not in (None, name) else ""
            body, said = {"default": name, "before": before}, f"the default model is {name}{was}"
    if as_json:
        _print_json(body)
    else:
        click.echo(said)


@model.command(
    epilog="Examples: gpuinfer model run digits --input three.png; "
    "echo '[[[0, 5, 13, 9, 1, 0, 0, 0], ...]]' | gpuinfer model run digits --input - --json"
)
@click.argument("name")
@click.option(
    "--input",
    "sources",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="A file: .json (one `inputs` value, as the API takes it), .npy (one item, or a batch of them), or "
    "an image; - is JSON from standard input. Several make one batch.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: worker.device.")
@click.option("--top-k", type=click.IntRange(min=1), help="How many classes to name.")
@click.option("--encoding", type=click.Choice(["list", "b64"]), default="list", show_default=True)
@_as_json
@click.pass_obj
def run(
    loaded: Loaded,
    name: str,
    sources: tuple[Path, ...],
    device: str | None,
    top_k: int | None,
    encoding: Encoding,
    as_json: bool,
) -> None:
    """Run the model NAME here, in this process, without a queue. Root becomes the workers' user for it."""
    folder = _repository(loaded).get(name)
    items = _items(folder.manifest, sources)
    settings = loaded.settings  # read as root; as the worker's user the files may be closed to us
    leave_root(say_warning)
    report = _run(folder, items, device or settings.worker.device, loaded, top_k, encoding)
    if as_json:
        _print_json(report)
        return
    for result in report["results"]:
        _print_result(result)
    timing = report["timing_ms"]
    where = f"{report['model']} on {report['device']}, batch of {len(items)}"
    click.echo(f"{where}: {timing['inference']:.2f} ms, after {timing['load']:.0f} ms to load and warm up")


def _run(
    folder: ModelFolder,
    items: list[Item],
    device: str,
    loaded: Loaded,
    top_k: int | None,
    encoding: Encoding,
) -> dict[str, Any]:
    if device != "cpu":
        check_visible(os.environ)  # before torch is imported, which would take the CPU without a word
    # Here, not above: torch takes seconds to import, and only this command needs it.
    from gpuinfer.models.device import pick_device
    from gpuinfer.models.loader import load
    from gpuinfer.models.outputs import render_batch

    begin = time.perf_counter()
    device = pick_device(device)
    ready = load(folder, device, threads=loaded.settings.worker.threads)
    size = ready.warm_up(min(len(items), folder.manifest.max_batch_size))
    warm = time.perf_counter()
    outputs = [row for at in range(0, len(items), size) for row in ready.forward(items[at : at + size])]
    done = time.perf_counter()
    count = len(items)
    return {
        "model": folder.manifest.name,
        "device": device,
        "results": render_batch(folder.manifest, outputs, top_k=[top_k] * count, encoding=[encoding] * count),
        "timing_ms": {"load": round((warm - begin) * 1e3, 3), "inference": round((done - warm) * 1e3, 3)},
    }


def _print_result(result: dict[str, Any]) -> None:
    if "outputs" in result:
        click.echo(json.dumps(result["outputs"], allow_nan=False))
        return
    table = Table("class", "label", "confidence", box=None, header_style="bold")
    for row in result["top_k"]:
        confidence = "" if row["confidence"] is None else f"{row['confidence']:.6f}"
        table.add_row(str(row["class"]), Text(row["label"]), confidence)
    _console().print(table)


def _items(manifest: Manifest, sources: tuple[Path, ...]) -> list[Item]:
    """Read all files and decode them. Raises the error of the first item that does not fit."""
    items: list[Item] = []
    for source in sources:
        for item in decode_batch(manifest, _values(manifest, source)):
            if isinstance(item, InputError):
                raise type(item)(f"{item.field}: {item.message}", str(source))
            items.append(item)
    return items


def _values(manifest: Manifest, source: Path) -> list[object]:
    """Return the ``inputs`` values a file holds."""
    try:
        if str(source) == "-":
            return [_unwrapped(json.load(sys.stdin))]
        if source.suffix == ".json":
            return [_unwrapped(json.loads(source.read_bytes()))]
        if source.suffix == ".npy":
            return _from_npy(manifest, np.load(source, allow_pickle=False))
    except (OSError, ValueError, EOFError, RecursionError) as exc:
        raise InputError(f"cannot be read: {exc}", str(source)) from exc
    return [_from_image(manifest, source)]


def _unwrapped(value: object) -> object:
    """Take the body of an API request, ``{"inputs": ...}``, as well as the bare value."""
    return value["inputs"] if isinstance(value, dict) and "inputs" in value else value


def _from_npy(manifest: Manifest, array: np.ndarray[Any, np.dtype[Any]]) -> list[object]:
    if len(manifest.inputs) > 1:
        raise UsageError(f"{manifest.name} has several inputs; give them as JSON", "input")
    if manifest.batchable and array.ndim == len(manifest.inputs[0].shape) + 1:
        return [array[place, ...] for place in range(len(array))]
    return [array]


def _from_image(manifest: Manifest, source: Path) -> object:
    from gpuinfer.models.images import image_to_array

    spec = manifest.inputs[0]
    if len(manifest.inputs) > 1 or spec.image is None:
        raise UsageError(
            f"{manifest.name} takes no image, its manifest has no [inputs.image]; give .json or .npy", "input"
        )
    try:
        return image_to_array(source, spec)
    except GpuinferError as exc:
        raise InputError(exc.message, str(source)) from exc
