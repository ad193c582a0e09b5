# SPDX-License-Identifier: Apache-2.0
"""How well each instance's GPU is: memory that others hold, no answer, errors of its memory."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from typing import Any

from gpuinfer.gpus import Inventory, list_gpus
from gpuinfer.settings import Settings
from gpuinfer.watcher.state import HEALTHY, GpuHealth


def instance_numbers(settings: Settings, inventory: Inventory) -> tuple[int, ...]:
    """Return which instances this host has: as many as set, else one a GPU, else a single one."""
    if settings.watcher.instances:
        return tuple(range(settings.watcher.instances))
    if settings.worker.device == "cpu":
        return (0,)
    # A GPU that does not answer has its number, too; a list in the settings names them all.
    broken = inventory.broken if inventory.source != "settings" else {}
    return tuple(sorted({*inventory.worker_numbers, *broken})) or (0,)


def look(settings: Settings, ours: Container[int] = (), nvml: Any = None) -> dict[int, GpuHealth]:
    """Return the health of each worker's GPU; workers that are well are left out. May take a while.

    ``ours`` are the instances that have a process: there, the memory in use is our own.
    """
    if settings.worker.device == "cpu":
        return {}
    found = list_gpus(settings.worker.gpus, nvml=nvml)
    faults = {**found.broken, **_memory_errors(nvml or _pynvml(), found)}
    health: dict[int, GpuHealth] = {}
    for number in instance_numbers(settings, found):
        gpu = found.of_worker(number)
        index = gpu.index if gpu is not None else number
        foreign = 0 if gpu is None or number in ours else gpu.used_bytes
        one = GpuHealth(foreign_bytes=foreign, fault=faults.get(index, ""))
        if one != HEALTHY:
            health[number] = one
    return health


def _pynvml() -> Any:
    import pynvml

    return pynvml


def _memory_errors(nvml: Any, found: Inventory) -> Mapping[int, str]:
    """Return the GPUs with rows of memory that wait for a reset, or could not be mapped out."""
    faults: dict[int, str] = {}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return faults  # the inventory says why
    try:
        for gpu in found.gpus:
            with suppress(nvml.NVMLError):  # not every GPU can remap rows
                handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
                _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
                if failed:
                    faults[gpu.index] = "its memory has errors that could not be mapped out"
                elif pending:
                    faults[gpu.index] = "its memory has errors; a reset of the GPU maps them out"
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    return faults
