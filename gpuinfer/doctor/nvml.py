# SPDX-License-Identifier: Apache-2.0
"""What NVML knows of a host's GPUs. It is asked in a child process, for a driver may hang or crash.

``python -m gpuinfer.doctor.nvml`` is that process. One that hangs in the driver cannot even be killed: it is
left behind, and the doctor goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import gpuinfer
from gpuinfer.gpus import Inventory, list_gpus
from gpuinfer.nvml import answer, opened

LIMIT_S = 20.0
#: Secrets, and what an administrator's shell hides of the GPUs.
_NOT_KEPT = ("GPUINFER_", "CREDENTIALS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Health:
    """What a GPU reports of itself; None where it cannot."""

    #: 0: the driver is unloaded when no process uses it.
    persistence: int | None = None
    #: 0 default, 2 prohibited, 3 only one process.
    compute_mode: int | None = None
    #: Since the driver was loaded.
    ecc_uncorrected: int | None = None
    #: Memory rows are to be replaced, which waits for a reset; and one could not be.
    remap_pending: int | None = None
    remap_failed: int | None = None
    #: The processes that compute on it.
    processes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What NVML reports of a host."""

    inventory: Inventory
    #: The newest CUDA the driver serves, as in 12.8; empty when unknown.
    cuda: str = ""
    #: NVML's index -> health.
    health: dict[int, Health] = field(default_factory=dict)


JSON: TypeAdapter[Report] = TypeAdapter(Report)


def ask(limit_s: float = LIMIT_S, module: str = "gpuinfer.doctor.nvml") -> Report:
    """Return NVML's report from a process of its own; of one that hangs or fails, why."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_KEPT)}
    path = [str(Path(gpuinfer.__file__).parents[1]), *filter(None, [kept.get("PYTHONPATH")])]
    child = subprocess.Popen(
        [sys.executable, *(["-I"] if sys.flags.isolated else []), "-m", module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**kept, "PYTHONPATH": os.pathsep.join(path), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    )
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=1.0)
        why = f"gave no answer in {limit_s:g} s"
    else:
        if out and not child.returncode:
            return JSON.validate_json(out.splitlines()[-1])
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        why = last[:500] or f"ended with status {child.returncode}"
    return Report(Inventory(reason=f"the driver does not answer: NVML {why}", failed=True))


def read(nvml: Any = None) -> Report:
    """Ask NVML everything; what a GPU or a driver cannot tell is left out."""
    nvml = nvml or import_module("pynvml")
    inventory = list_gpus(nvml=nvml)
    if inventory.source != "nvml":
        return Report(inventory)
    with opened(nvml):
        health = {gpu.index: _health(nvml, gpu.index) for gpu in inventory.gpus}
        number = answer(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        cuda = f"{number // 1000}.{number % 1000 // 10}" if number else ""
        return Report(inventory, cuda, health)


def _health(nvml: Any, index: int) -> Health:
    if (handle := answer(nvml, nvml.nvmlDeviceGetHandleByIndex, index)) is None:
        return Health()  # lost since it was listed
    rows = answer(nvml, nvml.nvmlDeviceGetRemappedRows, handle) or (0, 0, None, None)
    uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return Health(
        persistence=answer(nvml, nvml.nvmlDeviceGetPersistenceMode, handle),
        compute_mode=answer(nvml, nvml.nvmlDeviceGetComputeMode, handle),
        ecc_uncorrected=answer(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, volatile),
        remap_pending=rows[2],
        remap_failed=rows[3],
        processes=[one.pid for one in answer(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []],
    )


if __name__ == "__main__":
    sys.stdout.write("\n" + JSON.dump_json(read()).decode() + "\n")  # a library may have written before
