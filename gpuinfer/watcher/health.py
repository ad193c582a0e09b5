# SPDX-License-Identifier: Apache-2.0
"""The health of each instance's GPU: memory that other programs hold, no answer, memory errors, heat."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from gpuinfer import instances
from gpuinfer.gpu_binding import visible
from gpuinfer.gpu_readings import Reading, readings
from gpuinfer.gpus import Gpu, Inventory, chosen, list_gpus
from gpuinfer.nvml import answer, opened
from gpuinfer.settings import Settings
from gpuinfer.watcher.state import HEALTHY, GpuHealth

#: The index of a device that NVML does not list.
UNLISTED = -1


def instance_numbers(
    settings: Settings, inventory: Inventory, bound: Collection[int] = ()
) -> tuple[int, ...]:
    """Return which instances this host has: as many as the settings say, else one for each GPU, else one.

    ``bound``: instances whose own file names their device, such as a MIG slice.
    """
    if settings.watcher.instances:
        return tuple(range(settings.watcher.instances))
    if settings.worker.device == "cpu":
        return (0,)
    # A GPU that does not answer has its workers too; a list in the settings has them all.
    broken = inventory.broken if inventory.source != "settings" else {}
    places = {*inventory.places, *broken}
    return tuple(sorted({n for place in places for n in inventory.workers_at(place)}.union(bound))) or (0,)


def bound_by_files(folder: Path) -> dict[int, str]:
    """Return by instance the device that its own file names (CUDA_VISIBLE_DEVICES)."""
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
    #: What each GPU does now.
    readings: Sequence[Reading] = ()


def survey(
    settings: Settings, ours: Container[int] = (), nvml: Any = None, bound: Mapping[int, str] | None = None
) -> Survey:
    """Survey all GPUs. May take seconds.

    ``ours``: instances that have a process, so that the memory in use on their GPUs is our own. ``bound``:
    the devices that instances' own files name.
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
    """Return by NVML's index what is wrong with a GPU's memory, and how a GPU is too hot."""
    faults: dict[int, str] = {}
    hot: dict[int, str] = {}
    with opened(nvml) as answers:  # where it does not, the inventory says why
        for gpu in found.gpus if answers else ():
            if (handle := answer(nvml, nvml.nvmlDeviceGetHandleByIndex, gpu.index)) is not None:
                faults[gpu.index] = _memory_errors(nvml, handle)
                hot[gpu.index] = _heat(nvml, handle)
    return faults, hot


def _memory_errors(nvml: Any, handle: Any) -> str:
    """Return whether rows of memory wait for a reset, or could not be remapped; empty: neither."""
    _, _, pending, failed = answer(nvml, nvml.nvmlDeviceGetRemappedRows, handle) or (0, 0, 0, 0)
    if failed:
        return "its memory has errors that could not be remapped"
    return "its memory has errors; a reset of the GPU remaps them" if pending else ""


def _heat(nvml: Any, handle: Any) -> str:
    """Return whether a GPU is so hot that it slows down; empty: it is not.

    GPUs up to Ampere report the temperature at which they slow down; newer ones only that they do.
    """
    now = answer(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    limits = (
        ("shuts down", nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN),
        ("slows down", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
    )
    for what, which in limits:
        limit = answer(nvml, nvml.nvmlDeviceGetTemperatureThreshold, handle, which)
        if now is not None and limit and now >= limit:
            return f"it has {now} degrees C and {what} at {limit}"
    reasons = answer(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    if reasons & nvml.nvmlClocksThrottleReasonHwThermalSlowdown:
        return "heat slows it down" + (f" at {now} degrees C" if now is not None else "")
    return ""
