# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer submit``, ``result`` and ``cancel``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import TaskNotFound, TaskRevoked, WaitTimeout
from gpuinfer.models import completion as here
from gpuinfer.queue import completion
from gpuinfer.queue.options import OPTIONS
from gpuinfer.queue.show import as_json_option, one_line, print_json

if TYPE_CHECKING:
    from gpuinfer.client import Client
    from gpuinfer.queue.results import TaskStatus
    from gpuinfer.settings import Loaded

_ID = "6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21"
Command = Callable[..., Any]
_seconds = click.FloatRange(min=0, min_open=True)


_MAP_HELP = "Your own text, returned with the task. May be given up to 16 times."


def _map(_: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, str] | None:
    """Read NAME=VALUE. Raises BadParameter."""
    pairs = [text.partition("=") for text in texts]
    for name, sign, _text in pairs:
        if not name or not sign:
            raise click.BadParameter(f"must be NAME=VALUE, got {name or '='}", param=parameter)
    return {name: text for name, _sign, text in pairs} or None


def _options(command: Command) -> Command:
    """Add a flag for each task option."""
    for name, option in reversed(list(OPTIONS.items())):
        flag = f"--{name.removesuffix(option.flag_without).replace('_', '-')}"
        if option.kind == "boolean":
            command = click.option(flag, name, is_flag=True, help=_without_value(option.help))(command)
            continue
        if option.kind == "map":
            add = click.option(flag, name, multiple=True, metavar="NAME=VALUE", callback=_map, help=_MAP_HELP)
            command = add(command)
            continue
        kind: Any = str
        if option.choices:
            kind = click.Choice(option.choices)
        elif option.kind == "integer":
            kind = click.IntRange(option.least, option.most)
        elif option.kind == "number":
            kind = _seconds
        default = f" Default: {option.default}." if option.default is not None else ""
        names = here.names if name == "model" else None
        help = option.help + default
        add = click.option(flag, name, type=kind, default=option.default, help=help, shell_complete=names)
        command = add(command)
    return command


def _without_value(help: str) -> str:
    """Return the help of an option that is a flag: without "true: "."""
    text = help.removeprefix("true: ")
    return text[0].upper() + text[1:]


@click.command(
    epilog=examples(
        "gpuinfer submit --wait '[[[0, 5, 13, 9, 1, 0, 0, 0], ...]]'",
        "gpuinfer submit --model resnet cat.jpg",
        "gpuinfer submit --model vqa -F image=@cat.jpg -F text=What?",
        "gpuinfer submit --batch --queue batch images.npy",
        "cat three.json | gpuinfer submit -",
    )
)
@click.argument("inputs", nargs=-1, metavar="INPUT...", shell_complete=here.files)
@_options
@click.option(
    "-F",
    "--field",
    "fields",
    multiple=True,
    metavar="NAME=VALUE",
    help="Instead of INPUT, for a model with several inputs: JSON, text, or a file as NAME=@FILE.",
)
@click.option(
    "--batch", is_flag=True, help="Submit all inputs as one job; a single INPUT must hold their list."
)
@click.option(
    "--wait/--no-wait",
    help="Wait for the results and print them, or print the task ids at once. Default: --no-wait.",
)
@click.option(
    "--timeout", type=_seconds, default=60.0, help="Maximum wait in seconds, with --wait. Default: 60."
)
@as_json_option
@click.pass_obj
def submit(
    loaded: Loaded,
    /,
    inputs: tuple[str, ...],
    fields: tuple[str, ...],
    batch: bool,
    wait: bool,
    timeout: float,
    as_json: bool,
    **given: Any,
) -> int:
    """Submit tasks, and optionally wait for their results.

    Each INPUT becomes one task: a file, JSON text, or - for JSON on standard input. A .json file is sent as
    JSON, a .npy file as an array, a .txt file as text, and any other file (image, audio) unchanged. For a
    model with several inputs, give each one by name with -F.

    With --wait the exit code is that of the first failed task, or 75 after the timeout.
    """
    from gpuinfer.client import Client, Options
    from gpuinfer.client.inputs import read_batch, read_field, read_input

    if bool(inputs) == bool(fields) or (fields and batch):
        raise click.UsageError("give either INPUT, or -F NAME=VALUE for each input of one task")
    options: Options = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]  # click uses the names of Options
    with Client(loaded.only("broker", "queue")) as client:
        if fields:
            ids = [client.submit(dict(read_field(field) for field in fields), **options)]
        elif batch:
            ids = [client.submit_batch(read_batch(inputs), **options)]
        elif len(inputs) == 1:
            ids = [client.submit(read_input(inputs[0]), **options)]
        else:
            ids = client.submit_many([read_input(argument) for argument in inputs], **options)
        if wait and not options.get("ignore_result"):
            return _show(_ended(client, ids, timeout), as_json)
    if as_json:
        print_json({"task_ids": ids})
    else:
        click.echo("\n".join(ids))
    return 0


def _ended(client: Client, ids: Sequence[str], timeout_s: float) -> list[TaskStatus]:
    """Wait for tasks; return their states in order, including those still unfinished at the timeout."""
    found = {}
    try:
        for status in client.as_completed(ids, timeout_s):
            found[status.id] = status
    except WaitTimeout:
        pass
    return [found.get(task_id) or client.status(task_id) for task_id in ids]


def _show(statuses: Sequence[TaskStatus], as_json: bool) -> int:
    """Print tasks after --wait; return the exit code."""
    if as_json:
        print_json([status.to_dict() for status in statuses])
    else:
        for status in statuses:
            click.echo(f"{status.id}  {_words(status)}")
    return next((code for status in statuses if (code := _exit_code(status, waited=True))), 0)


def _words(status: TaskStatus) -> str:
    if status.state == "completed":
        return one_line(status.result)
    if status.error is not None:
        return f"{status.state}: {status.error} ({status.error.code})"
    return status.state if status.progress is None else f"{status.state}: {status.progress:.0%} done"


def _exit_code(status: TaskStatus, *, waited: bool) -> int:
    if status.error is not None:
        return status.error.exit_code
    return WaitTimeout.exit_code if waited and not status.final else 0


@click.command(epilog=examples(f"gpuinfer result {_ID} --wait 10"))
@click.argument("task_id")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait at most this long for the task to end.",
)
@as_json_option
@click.pass_obj
def result(loaded: Loaded, task_id: str, wait_s: float | None, as_json: bool) -> int:
    """Print the result of a task, or its state if it has not ended.

    The error of a failed task goes to standard error and sets the exit code. 66: the task is unknown.
    """
    from gpuinfer.client import Client

    with Client(loaded.only("broker", "queue")) as client:
        status = _ended(client, [task_id], wait_s)[0] if wait_s else client.status(task_id)
    if as_json:
        print_json(status.to_dict())
    else:
        click.echo(_words(status), err=status.error is not None)
    return _exit_code(status, waited=wait_s is not None)


@click.command(epilog=examples(f"gpuinfer cancel {_ID}"))
@click.argument(
    "task_ids",
    nargs=-1,
    required=True,
    metavar="TASK_ID...",
    shell_complete=completion.from_redis(completion.running, "worker"),
)
@as_json_option
@click.pass_obj
def cancel(loaded: Loaded, task_ids: tuple[str, ...], as_json: bool) -> int:
    """Cancel waiting or running tasks.

    Exit code 1: a task had already ended. 66: an id is unknown. It is cancelled anyway, because a task from a
    plain Celery producer is unknown until it runs.
    """
    from gpuinfer.client import Client

    known: dict[str, bool] = {}
    states: dict[str, str] = {}
    with Client(loaded.only("broker", "queue")) as client:
        for task_id in dict.fromkeys(task_ids):
            known[task_id] = _is_known(client, task_id)
            client.cancel(task_id)
            states[task_id] = client.status(task_id).state
    if as_json:
        print_json([{"task_id": one, "status": state, "known": known[one]} for one, state in states.items()])
    else:
        for task_id, state in states.items():
            click.echo(f"{task_id}: {_cancelled(state, known=known[task_id])}")
    if set(states.values()) != {"revoked"}:
        return TaskRevoked.exit_code
    return 0 if all(known.values()) else TaskNotFound.exit_code


def _is_known(client: Client, task_id: str) -> bool:
    try:
        client.status(task_id)
    except TaskNotFound:
        return False
    return True


def _cancelled(state: str, *, known: bool) -> str:
    if state != "revoked":
        return f"not cancelled: already {state}"
    return "cancelled" if known else "unknown id; cancelled in case it arrives later"
