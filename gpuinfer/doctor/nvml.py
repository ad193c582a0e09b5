# SPDX-License-Identifier: Apache-2.0
"""What NVML knows of a host's GPUs, in one report that passes through a pipe as JSON.

``python -m gpuinfer.doctor.nvml`` prints it: see ``child``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter

from gpuinfer.gpus import Inventory, list_gpus


@dataclass(frozen=True)
class Health:
    """What a GPU says of itself; None where it cannot tell."""

    persistence: bool | None = None
    #: 0 default, 2 prohibited, 3 one process alone.
    compute_mode: int | None = None
    #: Since the driver was loaded.
    ecc_uncorrected: int | None = None
    #: Memory rows are to be replaced, which waits for a reset; and one could not be.
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    temperature_c: int | None = None
    #: Process id -> bytes of the GPU's memory.
    processes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All of it."""

    inventory: Inventory
    #: The newest CUDA the driver serves, as in 12.8; empty when unknown.
    cuda: str = ""
    #: NVML's index -> health.
    health: dict[int, Health] = field(default_factory=dict)


_JSON: TypeAdapter[Report] = TypeAdapter(Report)


def to_json(report: Report) -> bytes:
    """Return the report as one line."""
    return _JSON.dump_json(report)


def from_json(text: bytes) -> Report:
    """Read what ``to_json`` wrote."""
    return _JSON.validate_json(text)


def read(nvml: Any = None) -> Report:
    """Ask NVML everything; what a GPU or a driver cannot tell is left out."""
    nvml = nvml or import_module("pynvml")
    inventory = list_gpus(nvml=nvml)
    if inventory.source != "nvml":
        return Report(inventory)
    nvml.nvmlInit()
    try:
        health = {gpu.index: _health(nvml, gpu.index) for gpu in inventory.gpus}
        return Report(inventory, _cuda(nvml), health)
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _cuda(nvml: Any) -> str:
    number = _try(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _health(nvml: Any, index: int) -> Health:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    rows = _try(nvml, nvml.nvmlDeviceGetRemappedRows, handle)
    uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    persistence = _try(nvml, nvml.nvmlDeviceGetPersistenceMode, handle)
    found = _try(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return Health(
        persistence=None if persistence is None else bool(persistence),
        compute_mode=_try(nvml, nvml.nvmlDeviceGetComputeMode, handle),
        ecc_uncorrected=_try(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, volatile),
        remap_pending=None if rows is None else bool(rows[2]),
        remap_failed=None if rows is None else bool(rows[3]),
        temperature_c=_try(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        processes={process.pid: process.usedGpuMemory or 0 for process in found},
    )


def _try(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer, or None: boards, drivers and rights differ in what may be asked."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


if __name__ == "__main__":
    sys.stdout.write("\n" + to_json(read()).decode() + "\n")  # a library may have written before
