# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer model init`` and ``add``: describe a model, try it, and install it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import UsageError
from gpuinfer.journal.sender import say_warning
from gpuinfer.models import tables
from gpuinfer.models.try_cli import device_of, gpu_option, warn

if TYPE_CHECKING:
    from gpuinfer.models import scaffold
    from gpuinfer.models.repository import ModelFolder
    from gpuinfer.models.scaffold import Wanted
    from gpuinfer.settings import Loaded

_source = click.argument("source", metavar="FILE|FOLDER", type=click.Path(exists=True, path_type=Path))


def _described(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for what cannot be read from the file."""
    for option in (
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="NAME:DTYPE:SHAPE",
            help="An input such as x:float32:3,224,224 (without the batch; -1: any length; empty: a number).",
        ),
        click.option(
            "--output",
            "outputs",
            multiple=True,
            metavar="NAME",
            help="Name of an output. May be repeated, in order.",
        ),
        click.option(
            "--class", "class_name", metavar="NAME", help="Class to use, if a Python file has several."
        ),
        click.option("--max-batch-size", type=click.IntRange(1, 65536), help="Maximum batch size."),
        click.option("--no-batch", is_flag=True, help="The model takes one item at a time."),
        click.option(
            "--name", metavar="NAME", help="Name of the model. Default: that of the file or folder."
        ),
    ):
        function = option(function)
    return function


def _wanted(
    name: str | None,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    class_name: str | None,
    max_batch_size: int | None,
    no_batch: bool,
) -> Wanted:
    from gpuinfer.models.scaffold import Wanted

    return Wanted(
        name=name,
        inputs=inputs,
        outputs=outputs,
        class_name=class_name,
        max_batch_size=max_batch_size,
        batchable=False if no_batch else None,
    )


def _ask() -> scaffold.Ask | None:
    """Return a function that prompts at the terminal; None without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask(question: str, default: str) -> str:
        answer: str = click.prompt(question, default=default, show_default=bool(default), err=True)
        return answer

    return ask


def _text(artefact: Path, wanted: Wanted, gpu: int | None = None) -> str:
    """Return the manifest of an artefact that the workers' user can read."""
    from gpuinfer.models import sandbox, scaffold

    found = sandbox.ask("describe", gpu=gpu, path=str(artefact), class_name=wanted.class_name)
    return scaffold.manifest_text(artefact, found, wanted, _ask())


@click.command(
    epilog=examples(
        "gpuinfer model init net.pt",
        "gpuinfer model init ./ocr",
        "gpuinfer model init net.pt --input image:float32:3,224,224",
    )
)
@_source
@_described
@click.option("--force", is_flag=True, help="Replace an existing model.toml.")
@click.pass_obj
def init(loaded: Loaded, /, source: Path, force: bool, **options: Any) -> None:
    """Write model.toml beside a model's file.

    Inputs and outputs are read from the file: TorchScript's signature and first layer, torch.export's graph,
    or a Python class's annotations and example. The command asks for missing details; without a terminal, an
    error names the option to use. Reading the file runs it, in the workers' sandbox.
    """
    from gpuinfer.models import sandbox, scaffold
    from gpuinfer.models.manifest import MANIFEST_FILE, load_manifest
    from gpuinfer.models.repository import name_of

    artefact = scaffold.checked_artefact(source) if source.is_file() else scaffold.artefact_in(source)
    target = artefact.parent / MANIFEST_FILE
    if target.exists() and not force:
        raise UsageError(f"{target} exists; --force replaces it", "source")
    wanted = _wanted(**options)
    if wanted.name is None:
        wanted.name = name_of(source)
    text = ""

    def write(copy: Path) -> None:
        nonlocal text
        text = _text(copy / artefact.name, wanted)
        (copy / MANIFEST_FILE).write_text(text, encoding="utf-8")

    if sandbox.confined():
        with tables.repository(loaded).copied(source, write, name=wanted.name):
            pass
    else:
        text = _text(artefact.resolve(), wanted)
    target.write_text(text, encoding="utf-8")
    load_manifest(target.parent)
    click.echo(f"wrote {target}; next: gpuinfer serve {source}, or gpuinfer model add {source}")


@click.command(
    epilog=examples(
        "gpuinfer model add net.pt",
        "gpuinfer model add ./resnet18 --name resnet",
        "gpuinfer model add ./resnet18 --expect sha256:8e1f…",
    )
)
@_source
@_described
@click.option("--force", is_flag=True, help="Replace an installed model with this name.")
@click.option(
    "--expect", metavar="DIGEST", help="Fail if the model's digest differs. model add prints the digest."
)
@gpu_option
@click.option("--untried", is_flag=True, help="Do not test the model first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def add(
    loaded: Loaded,
    /,
    source: Path,
    force: bool,
    expect: str | None,
    gpu: int | None,
    untried: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Try a model, then install it in the first of models.folders.

    FOLDER is a folder with a model.toml; for a FILE, or a folder without one, it is written (see init). The
    model is loaded and its example is run in the workers' sandbox, as their user, on the CPU or on --gpu N.
    If that fails, nothing is installed or replaced. The digest of all files is recorded. A model is a
    program: add only models that you trust.
    """
    from gpuinfer.models import sandbox, scaffold
    from gpuinfer.models.manifest import MANIFEST_FILE
    from gpuinfer.models.record import checked_digest

    wanted = _wanted(**options)
    if source.is_file():
        scaffold.checked_artefact(source)
    tried: dict[str, Any] = {}

    def write(staged: Path) -> None:
        artefact = staged / source.name if source.is_file() else scaffold.artefact_in(staged)
        text = _text(artefact, _named(wanted, staged.name), gpu)
        (staged / MANIFEST_FILE).write_text(text, encoding="utf-8")
        (staged / MANIFEST_FILE).chmod(0o644)

    def attempt(staged: ModelFolder) -> Mapping[str, Any]:
        device, number = device_of(loaded, gpu)
        threads = loaded.settings.worker.threads
        tried.update(
            sandbox.ask("attempt", gpu=number, folder=str(staged.path), device=device, threads=threads)
        )
        ran = None if tried["example"] is None else True
        return {"signature": tried["signature"], "example_ok": ran}

    folder = tables.repository(loaded).add(
        source,
        wanted.name,
        force,
        expect=expect and checked_digest(expect),
        trial=None if untried else attempt,
        init=write,
    )
    _tell(folder, tried, as_json=as_json)
    if not as_json:
        _say_next(loaded, folder.manifest.name)


def _say_next(loaded: Loaded, name: str) -> None:
    """Print how to make workers serve an added model."""
    served = name in loaded.settings.worker.models
    where = "" if served else f"name {name} in worker.models (/etc/gpuinfer/gpuinfer.toml), then "
    click.echo(
        f"next: {where}systemctl restart gpuinfer-workers.target; to try it: "
        f"gpuinfer submit --model {name} --wait INPUT"
    )


def _named(wanted: Wanted, name: str) -> Wanted:
    from gpuinfer.models.scaffold import Wanted

    return Wanted(**{**vars(wanted), "name": name})


def _tell(folder: ModelFolder, tried: Mapping[str, Any], *, as_json: bool) -> None:
    digest = folder.record.digest if folder.record else ""
    if as_json:
        body = {"name": folder.manifest.name, "path": str(folder.path), "digest": digest}
        tables.print_json({**body, "tried": dict(tried) or None})
        return
    warn(tried)
    if tried:
        ran = "its example ran" if tried["example"] is not None else "no example could run"
        click.echo(f"{ran} on {tried['device']}, loaded in {tried['load_ms']:.0f} ms")
    else:
        say_warning(f"{folder.manifest.name} was not tried")
    click.echo(f"added {folder.manifest.name} to {folder.path}")
    click.echo(digest)
