# SPDX-License-Identifier: Apache-2.0
"""What a host's GPUs do just now, for those who look: memory, heat, and how busy they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gpuinfer.gpus import Gpu

#: One GPU: ``index``, ``name``, ``workers`` (their numbers), ``memory_used`` and ``memory_total`` in bytes,
#: ``temperature_c``, ``busy`` from 0 to 1; None where the GPU cannot tell.
Reading = dict[str, Any]


def readings(nvml: Any, gpus: Mapping[int, Gpu]) -> Sequence[Reading]:
    """Return a reading of each GPU that workers run on, of MIG instances their own memory.

    ``gpus``: worker -> its GPU; ``nvml`` is the pynvml module. May take a while. What is lost meanwhile is
    left out.
    """
    shared: dict[str, list[int]] = {}
    for number, gpu in sorted(gpus.items()):
        shared.setdefault(gpu.selector, []).append(number)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []  # the inventory says why
    try:
        return [
            one
            for numbers in shared.values()
            if (one := _reading(nvml, gpus[numbers[0]], numbers)) is not None
        ]
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _reading(nvml: Any, gpu: Gpu, workers: Sequence[int]) -> Reading | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
    except nvml.NVMLError:
        return None
    rates = _try(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    return {
        "index": gpu.index,
        "name": gpu.name,
        "workers": [*workers],
        "memory_used": gpu.used_bytes if gpu.memory_bytes else None,
        "memory_total": gpu.memory_bytes or None,
        "temperature_c": _try(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "busy": None if rates is None else rates.gpu / 100,
    }


def _try(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer, or None: boards and drivers differ in what may be asked."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None
