# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer worker list``, ``drain``, ``resume`` and ``restart``."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import UnitRefused, UnitsUnavailable, UnknownWorker, UsageError
from gpuinfer.queue import completion
from gpuinfer.queue.show import as_json_option, print_json, print_table

if TYPE_CHECKING:
    import redis

    from gpuinfer.settings import Loaded

_NAME = re.compile(r"gpu\d+@[^\s@]+")


@contextmanager
def _connected(loaded: Loaded) -> Iterator[redis.Redis]:
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    with typed_errors(user_of(loaded.settings.broker)), connect(loaded.settings.broker) as client:
        yield client


def _worker(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of workers; a number means this host's. Raises BadParameter."""
    found = tuple(f"gpu{text}@{socket.gethostname()}" if text.isdecimal() else text for text in texts)
    for name in found:
        if not _NAME.fullmatch(name):
            words = f"must be a number or a name such as gpu0@host-1, got {name}"
            raise click.BadParameter(words, param=parameter)
    return found


_workers = click.argument(
    "workers",
    nargs=-1,
    required=True,
    metavar="N...",
    callback=_worker,
    shell_complete=completion.from_redis(completion.workers, "worker"),
)


@click.command("list", epilog=examples("gpuinfer worker list", "gpuinfer worker list --json"))
@as_json_option
@click.pass_obj
def list_(loaded: Loaded, as_json: bool) -> None:
    """List the workers of the fleet with state, models and rate.

    A worker without a heartbeat for 10 s is silent. Exit code 0, even if there are no workers.
    """
    from gpuinfer.queue import drained, heartbeats

    with _connected(loaded) as client:
        found = heartbeats.shown(*heartbeats.read(client))
        asked = drained.names(client)
    told = {one["worker"] for one in found}
    found += [{"worker": name, "alive": False, "seen_s": None} for name in asked if name not in told]
    for one in found:
        one["drained"] = one["worker"] in asked
    if as_json:
        print_json(found)
    elif found:
        print_table(("worker", "state", "models", "queues", "tasks/s", "done", "seen"), map(_row, found))
    else:
        click.echo(
            "no worker is running; the watcher starts one when tasks wait (see gpuinfer watcher explain)"
        )


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    state = str(one.get("state", "")) if one["alive"] else "silent"
    if one["drained"] and not state.startswith("drain"):  # its heartbeat does not say so yet
        state += ", drained"
    seen = "never" if one["seen_s"] is None else f"{one['seen_s']:.0f} s ago"
    return (
        *(one["worker"], state, ", ".join(one.get("models", ())), ", ".join(one.get("queues", ()))),
        *(f"{one.get('rate', 0):.1f}", str(one.get("done", "")), seen),
    )


@click.command(epilog=examples("gpuinfer worker drain 0", "gpuinfer worker drain gpu3@host-2 --json"))
@_workers
@click.option("--wait/--no-wait", help="Return when they have finished, or at once. Default: --no-wait.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=600.0,
    metavar="SECONDS",
    help="Maximum wait with --wait. Default: 600.",
)
@as_json_option
@click.pass_obj
def drain(loaded: Loaded, workers: tuple[str, ...], wait: bool, timeout: float, as_json: bool) -> int:
    """Let workers finish their tasks and take no new ones.

    N is the number of a worker of this host, or the name of any worker. It keeps its models loaded, and stays
    drained until resumed, even after a restart. Exit code 66: there is no such worker. 75: it did not finish
    within --timeout.
    """
    _set(loaded, workers, as_json, drained=True)
    return _finish(loaded, workers, timeout) if wait else 0


def _finish(loaded: Loaded, workers: tuple[str, ...], timeout_s: float) -> int:
    """Wait until these workers report that they have finished; return the exit code."""
    import time

    from gpuinfer.errors import WaitTimeout
    from gpuinfer.queue import heartbeats
    from gpuinfer.queue.drained import DRAINED

    until = time.monotonic() + timeout_s
    with _connected(loaded) as client:
        while True:
            beats = heartbeats.fresh(client, workers)
            busy = [name for name, body in beats.items() if body.get("state") != DRAINED]
            if not busy:
                return 0
            if time.monotonic() >= until:
                raise WaitTimeout(
                    f"{', '.join(busy)} did not finish within {timeout_s:g} s; they are still draining"
                )
            time.sleep(0.5)


@click.command(epilog=examples("gpuinfer worker resume 0"))
@_workers
@as_json_option
@click.pass_obj
def resume(loaded: Loaded, workers: tuple[str, ...], as_json: bool) -> None:
    """Let drained workers take tasks again.

    Exit code 66: there is no such worker.
    """
    _set(loaded, workers, as_json, drained=False)


def _set(loaded: Loaded, workers: tuple[str, ...], as_json: bool, *, drained: bool) -> None:
    from gpuinfer.queue import drained as draining

    with _connected(loaded) as client:
        known = draining.known(client)
        for name in workers:
            if name not in known:
                raise UnknownWorker(
                    f"there is no worker {name}; the workers are: {', '.join(known) or 'none'}", "worker"
                )
        changed = {name: draining.set_drained(client, name, drained) for name in workers}
    if as_json:
        print_json([{"worker": name, "drained": drained, "changed": new} for name, new in changed.items()])
        return
    for name, new in changed.items():
        if drained:
            said = "takes no new tasks until resumed" if new else "was already drained"
        else:
            said = "takes tasks again" if new else "was not drained"
        click.echo(f"{name}: {said}")


@click.command(epilog=examples("gpuinfer worker restart 0", "gpuinfer worker restart 0 1 --json"))
@_workers
@as_json_option
@click.pass_obj
def restart(loaded: Loaded, workers: tuple[str, ...], as_json: bool) -> int:
    """Restart workers of this host, one after the other.

    Each worker finishes its batch and returns its other tasks; the next one stops when it is ready again. A
    drained one stays drained. A worker that has failed, or that is enabled and does not run, is started. Exit
    code 64: the worker is on another host. 66: one neither runs nor is enabled, so nothing is restarted. 69:
    there is no systemd, or the unit did not start. 77: you may not restart units.
    """
    here = socket.gethostname()
    units = {}
    for name in workers:
        number, _, host = name.removeprefix("gpu").partition("@")
        if host != here:
            raise UsageError(
                f"{name} is on another host: run gpuinfer worker restart {number} on {host}", "N"
            )
        units[name] = f"gpuinfer-worker@{number}.service"
    if shutil.which("systemctl") is None:
        raise UnitsUnavailable(
            "systemctl is not installed here; stop the worker with SIGTERM and start it again"
        )
    ran = {name: _runs(name, unit) for name, unit in units.items()}
    for name, unit in units.items():
        _systemctl("restart", unit)
        if not as_json:
            click.echo(f"{name}: {'restarted' if ran[name] else 'did not run: started'}, and ready")
    if as_json:
        print_json([{"worker": name, "restarted": ran[name], "started": not ran[name]} for name in units])
    return 0


def _runs(name: str, unit: str) -> bool:
    """Tell whether a worker runs; False: it has failed, or is enabled. Raises UnknownWorker for others."""
    said = _systemctl("show", "--property=ActiveState,UnitFileState", unit)
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    state, enabled = found.get("ActiveState", ""), found.get("UnitFileState", "").startswith("enabled")
    if state == "inactive" and not enabled:
        words = f"{name} does not run, and is not enabled; to start it: systemctl start {unit}"
        raise UnknownWorker(words, "worker")
    return state not in ("inactive", "failed")


def _systemctl(*words: str) -> str:
    """Return what systemctl says. Raises UnitRefused, UnitsUnavailable."""
    done = subprocess.run(["systemctl", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        denied = "denied" in done.stderr or "authentication" in done.stderr
        error = UnitRefused if denied else UnitsUnavailable
        raise error(f"systemctl {words[0]} {words[-1]}: {done.stderr.strip() or done.returncode}")
    return done.stdout
