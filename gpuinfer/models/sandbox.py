# SPDX-License-Identifier: Apache-2.0
"""Runs a model in a separate process that may do no more than a worker, to answer a question: see ``trial``.

For root on an installed host, the process is a transient unit with the user and sandbox of the worker unit.
Otherwise it is a child process; started by root, it changes to the worker's user if there is one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import orjson

import gpuinfer
from gpuinfer import errors
from gpuinfer.errors import GpuinferError, ModelError, ModelLoadError
from gpuinfer.journal.sender import say_warning
from gpuinfer.privileges import WORKER_USER, warn_root, worker_user

#: Large models take minutes from a cold disk.
LIMIT_S = 900.0
KILL_WAIT_S = 5.0
UNIT = "gpuinfer-worker@0.service"
#: Secrets and settings, which the model must not see.
_NOT_KEPT = ("GPUINFER_", "CREDENTIALS", "NOTIFY_SOCKET", "WATCHDOG_")
#: Directives of the unit's [Service] that concern neither its user nor its sandbox.
_NOT_TAKEN = (
    *("Type", "Exec", "Environment", "LoadCredential", "Restart", "Timeout", "Watchdog", "KillMode"),
    *("RuntimeDirectory", "LogRateLimit", "SuccessExitStatus", "OOMScoreAdjust", "NotifyAccess"),
)


def ask(
    what: str,
    *,
    gpu: int | Literal["all"] | None = None,
    limit_s: float = LIMIT_S,
    quiet: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Ask ``trial`` a question and return its answer. ``gpu``: the GPU that it sees; None: no GPU.

    ``quiet``: do not warn that model code runs as root, on a host without the workers' user.
    Raises the model's error; ModelLoadError if the process ends, or takes too long, without an answer.
    """
    if not quiet:
        warn_root(say_warning)
    question = orjson.dumps({"do": what, **arguments})
    environment = _environment(gpu)
    command = [*_wrapper(environment, limit_s), *_python(), "-m", "gpuinfer.models.trial"]
    # It inherits standard error, so that what the model prints is shown at once.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/")
    try:
        out, _ = child.communicate(question, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise ModelLoadError(f"did not answer within {limit_s:g} s", what) from None
    finally:
        if child.poll() is None:
            child.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver cannot be killed
                child.wait(KILL_WAIT_S)
    return _answer(child.returncode, out)


def _answer(status: int, out: bytes) -> dict[str, Any]:
    lines = out.splitlines()
    if status or not lines:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise ModelLoadError(f"the process that ran the model {how}, without an answer")
    answer: dict[str, Any] = orjson.loads(lines[-1])
    if "error" in answer:
        raise _error(answer["error"])
    return answer


def _error(told: Mapping[str, Any]) -> GpuinferError:
    """Return the process's error, with its class, as that decides the exit code."""
    known = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, GpuinferError)]
    cls = next((cls for cls in known if cls.code == told["code"]), ModelError)
    return cls(told["message"], told.get("field"))


def _python() -> list[str]:
    return [sys.executable, *(["-I"] if sys.flags.isolated else [])]


def _environment(gpu: int | Literal["all"] | None) -> dict[str, str]:
    """Return an environment without secrets that has this package, and one GPU, all or none.

    The caller's own CUDA_VISIBLE_DEVICES is ignored.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_KEPT)}
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    here = str(Path(gpuinfer.__file__).parents[1])
    path = os.pathsep.join(part for part in (here, kept.get("PYTHONPATH", "")) if part)
    if gpu != "all":
        kept["CUDA_VISIBLE_DEVICES"] = "" if gpu is None else str(gpu)
    return {
        **kept,
        "PYTHONPATH": path,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@cache
def confined() -> bool:
    """Tell whether questions are asked in a transient unit: for root, on a host with gpuinfer's units.

    If systemd refuses the unit's directives, warn and use a child process.
    """
    if os.geteuid() != 0 or worker_user() is None or not Path("/run/systemd/system").is_dir():
        return False
    unit = _unit()
    if not unit:
        return False
    done = subprocess.run([*_in_unit(unit), "/bin/true"], check=False, capture_output=True, text=True)
    if done.returncode:
        why = " ".join(done.stderr.split())[:300]
        say_warning(
            f"the sandbox of {UNIT} cannot be used; the model runs as {WORKER_USER} without it: {why}"
        )
    return done.returncode == 0


def _in_unit(unit: str) -> list[str]:
    """Return the start of a command line that runs a command with a unit's user, limits and sandbox."""
    properties = (f"--property={line}" for line in directives(unit))
    return ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", *properties]


def _wrapper(environment: Mapping[str, str], limit_s: float) -> list[str]:
    """Return the start of a command line that runs a command in the worker's sandbox; [] if there is none."""
    if not confined():
        return []
    names = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "PYTHONDONTWRITEBYTECODE", "LANG")
    variables = [f"--setenv={name}={environment[name]}" for name in names if name in environment]
    home = "--setenv=HOME=/var/cache/gpuinfer/worker"
    return [*_in_unit(_unit()), home, *variables, f"--property=RuntimeMaxSec={limit_s:g}"]


def _unit() -> str:
    done = subprocess.run(["systemctl", "cat", UNIT], check=False, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def directives(unit: str) -> list[str]:
    """Return the lines of a unit, drop-ins included, that set its user, its limits and its sandbox."""
    taken, section = [], ""
    for line in unit.splitlines():
        if line.startswith("["):
            section = line.strip()
        elif section == "[Service]" and line[:1].isupper() and not line.startswith(_NOT_TAKEN):
            taken.append(line.strip().replace("%i", "0"))
    return taken
