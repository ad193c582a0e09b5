# SPDX-License-Identifier: Apache-2.0
"""The health of each instance's GPU: memory that other programs hold, no answer, memory errors, heat."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from gpuinfer import instances
from gpuinfer.gpu_binding import visible
from gpuinfer.gpu_readings import Reading, readings
from gpuinfer.gpus import Gpu, Inventory, chosen, list_gpus
from gpuinfer.settings import Settings
from gpuinfer.watcher.state import HEALTHY, GpuHealth

#: The index of a device that NVML does not list.
UNLISTED = -1


def instance_numbers(
    settings: Settings, inventory: Inventory, bound: Collection[int] = ()
) -> tuple[int, ...]:
    """Return which instances this host has: as many as set, else one a GPU, else a single one.

    ``bound`` are those whose own file names their GPU, such as a MIG instance.
    """
    if settings.watcher.instances:
        return tuple(range(settings.watcher.instances))
    if settings.worker.device == "cpu":
        return (0,)
    # A GPU that does not answer has its workers, too; a list in the settings names them all.
    broken = inventory.broken if inventory.source != "settings" else {}
    places = {*inventory.places, *broken}
    return tuple(sorted({n for place in places for n in inventory.workers_at(place)}.union(bound))) or (0,)


def bound_by_files(folder: Path) -> dict[int, str]:
    """Return the device that an instance's own file names (CUDA_VISIBLE_DEVICES), by instance."""
    found: dict[int, str] = {}
    for number in instances.with_file(folder):
        with suppress(OSError):  # ``Served`` reads the same file, and logs the error
            entries = visible(instances.read(number, folder)) or ()
            if len(entries) == 1 and entries != (str(number),):
                found[number] = entries[0]
    return found


@dataclass(frozen=True, slots=True)
class Survey:
    """The state of all GPUs of a host at one moment."""

    #: The instances that this host has GPUs for.
    numbers: tuple[int, ...]
    #: Instance -> health, of those whose GPU has a problem or is shared with other programs.
    health: Mapping[int, GpuHealth]
    #: Instance -> NVML's index of its GPU; instances on slices of one GPU share it.
    indices: Mapping[int, int]
    #: The driver failed to list the GPUs: there may be more.
    failed: bool = False
    #: What each GPU does just now.
    readings: Sequence[Reading] = ()


def survey(
    settings: Settings, ours: Container[int] = (), nvml: Any = None, bound: Mapping[int, str] | None = None
) -> Survey:
    """Survey all GPUs. May take a while.

    ``ours`` are the instances that have a process: the memory in use on their GPUs is our own. ``bound``: the
    devices that instances' own files name.
    """
    nvml, bound = nvml or pynvml(), bound or {}
    found = list_gpus(settings.worker.gpus, per_gpu=settings.worker.per_gpu, nvml=nvml)
    faults, hot = _ask_each(nvml, found)
    faults = {**found.broken, **faults}
    health: dict[int, GpuHealth] = {}
    indices: dict[int, int] = {}
    known: dict[int, Gpu] = {}
    numbers = instance_numbers(settings, found, bound)
    for number in numbers:
        place = number // found.per_gpu
        gpu, sharing = found.of_worker(number), {*found.workers_at(place)} - bound.keys()
        if number in bound:
            (named,) = chosen((bound[number],), replace(found, gpus=found.listed or found.gpus)).gpus
            gpu = named if named.name else None  # NVML lists no such device, or hides it from this user
            place = UNLISTED
            sharing = {other for other, device in bound.items() if device == bound[number]}
        if gpu is not None and gpu.name:
            known[number] = gpu
        index = indices[number] = gpu.index if gpu is not None else place
        shared = any(other in ours for other in sharing)
        foreign = 0 if gpu is None or shared else gpu.used_bytes
        one = GpuHealth(foreign_bytes=foreign, fault=faults.get(index, ""), hot=hot.get(index, ""))
        if one != HEALTHY:
            health[number] = one
    return Survey(numbers, health, indices, failed=found.failed, readings=readings(nvml, known))


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
        return faults, hot  # the inventory has the reason
    try:
        for gpu in found.gpus:
            with suppress(nvml.NVMLError):  # lost since it was listed; the next survey has it
                handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
                faults[gpu.index] = _memory_errors(nvml, handle)
                hot[gpu.index] = _heat(nvml, handle)
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    return faults, hot


def _memory_errors(nvml: Any, handle: Any) -> str:
    """Say whether rows of memory wait for a reset, or could not be remapped."""
    _, _, pending, failed = _try(nvml, nvml.nvmlDeviceGetRemappedRows, handle) or (0, 0, 0, 0)
    if failed:
        return "its memory has errors that could not be remapped"
    return "its memory has errors; a reset of the GPU remaps them" if pending else ""


def _heat(nvml: Any, handle: Any) -> str:
    """Say whether a GPU is so hot that it slows down.

    GPUs up to Ampere report the temperature at which they do; newer ones report that they are slowed down.
    """
    now = _try(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    limits = (
        ("shuts down", nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN),
        ("slows down", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
    )
    for what, which in limits:
        limit = _try(nvml, nvml.nvmlDeviceGetTemperatureThreshold, handle, which)
        if now is not None and limit and now >= limit:
            return f"it has {now} degrees C and {what} at {limit}"
    reasons = _try(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    if reasons & nvml.nvmlClocksThrottleReasonHwThermalSlowdown:
        return "heat slows it down" + (f" at {now} degrees C" if now is not None else "")
    return ""


def _try(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer, or None: boards and drivers differ in what may be asked."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None
