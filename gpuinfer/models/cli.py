# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer model``: list, show, verify, remove, set the default; and what adds and tries models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import GpuinferError, ModelError, UsageError
from gpuinfer.models import completion, tables
from gpuinfer.models.add_cli import add, init
from gpuinfer.models.try_cli import bench, check, run
from gpuinfer.plural import tasks_wait

if TYPE_CHECKING:
    from gpuinfer.models.repository import Entry, ModelFolder, Repository
    from gpuinfer.settings import Loaded


@click.group("model")
def model() -> None:
    """List, check, install and remove models.

    A model is a folder with model.toml and its code: Python (.py), TorchScript (.pt) or torch.export (.pt2).
    With a single file, gpuinfer serve FILE tries it and gpuinfer model add FILE installs it.
    """


for _command in (init, add, check, run, bench):
    model.add_command(_command)


@model.command("list", epilog=examples("gpuinfer model list --json"))
@tables.as_json_option
@click.pass_obj
def list_(loaded: Loaded, as_json: bool) -> None:
    """List installed models, including those with an invalid manifest."""
    from rich.table import Table
    from rich.text import Text

    entries = tables.repository(loaded).entries()
    if as_json:
        tables.print_json([_entry_json(entry) for entry in entries])
        return
    table = Table("name", "format", "batch", "inputs", "outputs", "from", box=None, header_style="bold")
    for entry in entries:
        table.add_row(*map(Text, _entry_row(entry)))
    tables.console().print(table)


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
        ", ".join(_inputs(entry.folder)),
        ", ".join(f"{o.name} ({o.kind})" for o in manifest.outputs),
        "shipped" if entry.folder.shipped else str(entry.path.parent),
    ]


def _inputs(folder: ModelFolder) -> list[str]:
    """Return name and type of each input."""
    inputs = folder.signature.inputs if folder.signature else ()
    return [
        f"{one.name} {one.kind if one.shape is None else f'{one.dtype}{list(one.shape)}'}" for one in inputs
    ]


@model.command(epilog=examples("gpuinfer model show digits"))
@click.argument("name", shell_complete=completion.names)
@tables.as_json_option
@click.pass_obj
def show(loaded: Loaded, name: str, as_json: bool) -> None:
    """Show inputs, outputs, limits and digest of model NAME."""
    from rich.table import Table
    from rich.text import Text

    folder = tables.repository(loaded).get(name)
    body = {
        **folder.manifest.model_dump(mode="json", by_alias=True),
        "format": folder.manifest.format,
        "path": str(folder.path),
        "shipped": folder.shipped,
        "digest": folder.record.digest if folder.record else None,
        "added_at": folder.record.added_at if folder.record else None,
    }
    if as_json:
        tables.print_json(body)
        return
    table = Table("key", "value", box=None, show_header=False)
    for key, value in _shown(folder):
        table.add_row(key, Text(value))
    tables.console(most=100).print(table)


def _shown(folder: ModelFolder) -> Iterator[tuple[str, str]]:
    """Yield the main facts about a model; --json prints all of them."""
    manifest, record = folder.manifest, folder.record
    yield "name", manifest.name
    if manifest.description:
        yield "description", manifest.description
    yield "artefact", f"{manifest.artefact} ({manifest.format})"
    for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            said = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            shape = said.pop("shape", None)
            is_array = kind == "output" or spec.kind == "tensor"
            words = [spec.kind, spec.dtype or "" if is_array else "", "" if shape is None else str(shape)]
            rest = ", ".join(f"{key} {_short(value)}" for key, value in said.items() if key not in _IN_WORDS)
            yield kind, f"{spec.name}: {' '.join(word for word in words if word)}{rest and f'; {rest}'}"
    if not manifest.inputs:
        yield "inputs", ", ".join(_inputs(folder)) or "defined by its code"
    yield "batch", f"up to {manifest.max_batch_size}" if manifest.batchable else "one item at a time"
    limits = (manifest.soft_time_limit_s, manifest.hard_time_limit_s, manifest.max_time_limit_s)
    yield "time limits", "{:g} s soft, {:g} s hard; a request may ask for {:g} s".format(*limits)
    yield "path", str(folder.path) + (" (shipped)" if folder.shipped else "")
    if record:
        yield "digest", record.digest
        if record.added_at:
            yield "added", record.added_at


#: What a line of an input or output begins with.
_IN_WORDS = ("name", "kind", "dtype")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@model.command("verify", epilog=examples("gpuinfer model verify digits"))
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completion.names)
@tables.as_json_option
@click.pass_obj
def verify_(loaded: Loaded, names: tuple[str, ...], as_json: bool) -> None:
    """Check a model's files against the digest recorded by model add.

    Without NAME, all models are checked; the command fails at the end if any check failed.
    """
    repository = tables.repository(loaded)
    checked = {name: _verified(repository, name) for name in names or [e.name for e in repository.entries()]}
    if as_json:
        tables.print_json(
            [{"name": n, "ok": not isinstance(r, ModelError), "detail": str(r)} for n, r in checked.items()]
        )
    else:
        for name, result in checked.items():
            click.echo(f"{name}: {'FAILED, ' if isinstance(result, ModelError) else 'OK, '}{result}")
    for result in checked.values():
        if isinstance(result, ModelError):
            raise result


def _verified(repository: Repository, name: str) -> str | ModelError:
    from gpuinfer.models.repository import verify

    try:
        return verify(repository.get(name))
    except ModelError as exc:
        return exc


@model.command(
    epilog=examples(
        "gpuinfer model remove resnet", "gpuinfer model remove resnet --forget  # of another host"
    )
)
@click.argument("name", shell_complete=completion.names)
@click.option("--forget", is_flag=True, help="Only delete the entry in the fleet's catalogue, no files.")
@click.pass_obj
def remove(loaded: Loaded, name: str, forget: bool) -> None:
    """Delete model NAME from this host and from the fleet's catalogue.

    Requests for a model that is not in the catalogue are refused. Workers that have loaded it keep it until
    they are restarted, and until then it stays in the catalogue. The files are deleted even if Redis does not
    answer.
    """
    if not forget:
        click.echo(f"removed {tables.repository(loaded).remove(name)}")
        if name in loaded.settings.worker.models:
            click.echo(f"worker.models still lists {name}; gpuinfer config show prints in which file")
    try:
        said = _forgotten(loaded, name)
    except GpuinferError as exc:
        if forget:
            raise
        said = (
            f"the catalogue is unchanged ({exc.message}); it drops the name after seven days without a worker"
        )
    click.echo(said)


def _forgotten(loaded: Loaded, name: str) -> str:
    """Remove a model from the catalogue unless it is in use; return a sentence about the result."""
    from gpuinfer.queue import catalogue, keys
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    # Not as the worker's user, as in the other commands: it may not change the catalogue.
    broker = loaded.only("broker").broker
    with typed_errors(user_of(broker)), connect(broker) as client:
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
            said += f"; {tasks_wait(count)} for it, see gpuinfer queue purge {keys.queue_name(queue, name)}"
        return said


@model.command(epilog=examples("gpuinfer model default", "gpuinfer model default resnet"))
@click.argument("name", required=False, shell_complete=completion.names)
@click.option("--force", is_flag=True, help="Accept a NAME unknown to the fleet.")
@tables.as_json_option
@click.pass_obj
def default(loaded: Loaded, name: str | None, force: bool, as_json: bool) -> None:
    """Print the fleet's default model, or set it to NAME.

    The default model serves requests that name no model, on all hosts. Clients notice a change within five
    seconds. Waiting tasks that name a model are not affected; waiting tasks from plain Celery producers that
    name none go to the new default.
    """
    from gpuinfer.names import MODEL_NAME
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
        tables.print_json(body)
    else:
        click.echo(said)
