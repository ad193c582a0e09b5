# SPDX-License-Identifier: Apache-2.0
"""Ask in a child process what may hang or crash: the driver.

CUDA and models are asked in the workers' sandbox (``gpuinfer.models.sandbox``). A process stuck in the driver
cannot even be killed; it is left behind, and the doctor goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import gpuinfer
from gpuinfer.errors import GpuinferError

_KILL_WAIT_S = 1.0
#: Secrets, and what an administrator's shell hides of the GPUs.
_NOT_KEPT = ("GPUINFER_", "CREDENTIALS", "CUDA_VISIBLE_DEVICES")


class ChildHung(GpuinferError):
    """Raised when a child process gave no answer within its limit."""

    code = "child_hung"


class ChildFailed(GpuinferError):
    """Raised when a child process ended without an answer. Carries its last line."""

    code = "child_failed"


def ask_nvml(limit_s: float, module: str = "gpuinfer.doctor.nvml") -> bytes:
    """Return NVML's report in JSON, from a process of its own. Raises ChildHung, ChildFailed."""
    isolated = ["-I"] if sys.flags.isolated else []
    child = subprocess.Popen(
        [sys.executable, *isolated, "-m", module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=_environment(),
    )
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _abandon(child)
        raise ChildHung(f"gave no answer in {limit_s:g} s", "nvml") from None
    if child.returncode:
        raise ChildFailed(_why(child.returncode, err), "nvml")
    return out.splitlines()[-1] if out else b""


def _environment() -> dict[str, str]:
    """Return the environment without secrets, in which this very package is found and all GPUs are seen."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_KEPT)}
    here = str(Path(gpuinfer.__file__).parents[1])
    path = os.pathsep.join(part for part in (here, kept.get("PYTHONPATH", "")) if part)
    return {**kept, "PYTHONPATH": path, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _abandon(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and its group, and wait for it no longer than a moment."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_KILL_WAIT_S)
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def _why(status: int, err: bytes) -> str:
    lines = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
    if status < 0:
        return f"was killed by signal {-status} ({signal.Signals(-status).name})"
    return (lines[-1] if lines else f"ended with status {status}")[:500]
