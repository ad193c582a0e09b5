# SPDX-License-Identifier: Apache-2.0
"""What a host's GPUs do now, for people and metrics: memory, temperature, and how busy they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuinfer.gpus import Gpu
from gpuinfer.nvml import answer, opened

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
    with opened(nvml) as answers:  # where it does not, the inventory says why
        found = [_reading(nvml, gpus[those[0]], those) for those in shared.values()] if answers else []
    return [one for one in found if one is not None]


def _reading(nvml: Any, gpu: Gpu, workers: Sequence[int]) -> Reading | None:
    if (handle := answer(nvml, nvml.nvmlDeviceGetHandleByIndex, gpu.index)) is None:
        return None
    rates = answer(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    return {
        "index": gpu.index,
        "name": gpu.name,
        "workers": [*workers],
        "memory_used": gpu.used_bytes if gpu.memory_bytes else None,
        "memory_total": gpu.memory_bytes or None,
        "temperature_c": answer(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "busy": None if rates is None else rates.gpu / 100,
    }
