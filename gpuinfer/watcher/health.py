# SPDX-License-Identifier: Apache-2.0
"""How well each instance's GPU is: memory that others hold, no answer, errors of its memory, heat."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
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
    # A GPU that does not answer has its workers, too; a list in the settings names them all.
    broken = inventory.broken if inventory.source != "settings" else {}
    places = sorted({*inventory.places, *broken})
    return tuple(number for place in places for number in inventory.workers_at(place)) or (0,)


@dataclass(frozen=True, slots=True)
class Survey:
    """One look at all GPUs of a host."""

    #: Instance -> health, of those whose GPU is not quite well or not ours alone.
    health: dict[int, GpuHealth]
    #: Instance -> NVML's index of its GPU; instances on slices of one GPU share it.
    indices: dict[int, int]


def look(settings: Settings, ours: Container[int] = (), nvml: Any = None) -> dict[int, GpuHealth]:
    """Return the health of each worker's GPU; workers that are well are left out. May take a while."""
    return survey(settings, ours, nvml).health


def survey(settings: Settings, ours: Container[int] = (), nvml: Any = None) -> Survey:
    """Look at all GPUs. May take a while.

    ``ours`` are the instances that have a process: the memory in use on their GPUs is our own.
    """
    if settings.worker.device == "cpu":
        return Survey({}, {})
    nvml = nvml or pynvml()
    found = list_gpus(settings.worker.gpus, per_gpu=settings.worker.per_gpu, nvml=nvml)
    faults, hot = _ask_each(nvml, found)
    faults = {**found.broken, **faults}
    health: dict[int, GpuHealth] = {}
    indices: dict[int, int] = {}
    for number in instance_numbers(settings, found):
        gpu = found.of_worker(number)
        place = number // found.per_gpu
        index = indices[number] = gpu.index if gpu is not None else place
        shared = any(other in ours for other in found.workers_at(place))
        foreign = 0 if gpu is None or shared else gpu.used_bytes
        one = GpuHealth(foreign_bytes=foreign, fault=faults.get(index, ""), hot=hot.get(index, ""))
        if one != HEALTHY:
            health[number] = one
    return Survey(health, indices)


def pynvml() -> Any:
    """Return NVML's binding."""
    return import_module("pynvml")


def _ask_each(nvml: Any, found: Inventory) -> tuple[Mapping[int, str], Mapping[int, str]]:
    """Return by NVML's index what is wrong with GPUs' memory, and which are too hot."""
    faults: dict[int, str] = {}
    hot: dict[int, str] = {}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return faults, hot  # the inventory says why
    try:
        for gpu in found.gpus:
            with suppress(nvml.NVMLError):  # lost since it was listed; the next look says so
                handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
                faults[gpu.index] = _memory_errors(nvml, handle)
                hot[gpu.index] = _heat(nvml, handle)
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    return faults, hot


def _memory_errors(nvml: Any, handle: Any) -> str:
    """Tell of rows of memory that wait for a reset, or could not be mapped out."""
    _, _, pending, failed = _try(nvml, nvml.nvmlDeviceGetRemappedRows, handle) or (0, 0, 0, 0)
    if failed:
        return "its memory has errors that could not be mapped out"
    return "its memory has errors; a reset of the GPU maps them out" if pending else ""


def _heat(nvml: Any, handle: Any) -> str:
    """Tell of a GPU that is so hot that it slows down.

    Where it does so is told up to Ampere; newer drivers and GPUs tell that they are slowed down.
    """
    now = _try(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    limits = (
        ("shuts down", nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN),
        ("slows down", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
    )
    for what, which in limits:
        limit = _try(nvml, nvml.nvmlDeviceGetTemperatureThreshold, handle, which)
        if now is not None and limit and now >= limit:
            return f"it is {now} degrees hot, and {what} at {limit}"
    reasons = _try(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    if reasons & nvml.nvmlClocksThrottleReasonHwThermalSlowdown:
        return "it is slowed down by its heat" + (f" of {now} degrees" if now is not None else "")
    return ""


def _try(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer, or None: boards and drivers differ in what may be asked."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None
