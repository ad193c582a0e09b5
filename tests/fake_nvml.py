# SPDX-License-Identifier: Apache-2.0
"""A small NVML in place of hardware: the one fake that stands for GPUs in the tests."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GIB = 1024**3


@dataclass
class FakeNvml:
    """NVML's functions that we call, over a made-up host."""

    count: int = 0
    #: Error of nvmlInit; None: it works.
    init: int | None = None
    lost: frozenset[int] = frozenset()
    shared_memory: bool = False
    #: GPU -> (rows waiting for a reset, a row that failed)
    remapped: dict[int, tuple[int, int]] = field(default_factory=dict)
    ecc: int = 0
    used_bytes: int = GIB
    persistent: bool = True
    compute_mode: int = 0
    #: GPU -> its MIG instances by slot, None for an empty one; a GPU that is not named cannot be split.
    mig: dict[int, list[str | None]] = field(default_factory=dict)
    temperature_c: int = 40
    busy_percent: int = 25
    #: None: the GPU does not tell them, as from Ada on.
    slows_down_c: int | None = 92
    shuts_down_c: int | None = 97
    slowed_down: bool = False
    #: GPUs that tell no events.
    deaf: frozenset[int] = frozenset()
    #: What ``nvmlEventSetWait_v2`` returns next: (GPU, Xid), or an error's number.
    events: queue.SimpleQueue[tuple[int, int] | int] = field(default_factory=queue.SimpleQueue, init=False)
    registered: set[int] = field(default_factory=set, init=False)
    sets: int = field(default=0, init=False)
    opened: int = field(default=0, init=False)
    closed: int = field(default=0, init=False)

    NVML_DEVICE_MIG_ENABLE = 1
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SHUTDOWN = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlEventTypeXidCriticalError = 8
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_TIMEOUT = 10
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    class NVMLError(Exception):
        """As pynvml's: a number, and the driver's words."""

        def __init__(self, value: int) -> None:
            super().__init__(value)
            self.value = value

        def __str__(self) -> str:
            words = {9: "Driver Not Loaded", 12: "NVML Shared Library Not Found", 15: "GPU is lost"}
            return words.get(self.value, "Driver/library version mismatch")

    def nvmlInit(self) -> None:
        if self.init is not None:
            raise self.NVMLError(self.init)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index in self.lost:
            raise self.NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return f"GPU-{handle:08x}-0000" if isinstance(handle, int) else f"MIG-{handle[0]}-{handle[1]}"

    def nvmlDeviceGetName(self, handle: Any) -> bytes:
        return b"NVIDIA L4" if isinstance(handle, int) else f"NVIDIA L4 MIG {handle[2]}".encode()

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        if handle not in self.mig:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return [self.NVML_DEVICE_MIG_ENABLE, self.NVML_DEVICE_MIG_ENABLE]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return len(self.mig[handle])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, slot: int) -> tuple[int, int, str]:
        profile = self.mig[handle][slot]
        if profile is None:
            raise self.NVMLError(self.NVML_ERROR_NOT_FOUND)
        return handle, slot, profile

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=f"00000000:0{handle}:00.0")

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if self.shared_memory:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=24 * GIB, used=self.used_bytes)

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlDeviceGetPersistenceMode(self, handle: int) -> int:
        return int(self.persistent)

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        return self.compute_mode

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        return self.ecc

    def nvmlDeviceGetRemappedRows(self, handle: int) -> list[int]:
        if handle not in self.remapped:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return [0, 0, *self.remapped[handle]]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return self.temperature_c

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=self.busy_percent, memory=0)

    def nvmlDeviceGetTemperatureThreshold(self, handle: int, which: int) -> int:
        limit = (self.shuts_down_c, self.slows_down_c)[which]
        if limit is None:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return limit

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.nvmlClocksThrottleReasonHwThermalSlowdown if self.slowed_down else 1

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        if handle in self.lost:
            raise self.NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        return handle

    def nvmlEventSetCreate(self) -> str:
        self.sets += 1
        return "set"

    def nvmlEventSetFree(self, events: str) -> None:
        self.sets -= 1

    def nvmlDeviceRegisterEvents(self, handle: int, types: int, events: str) -> None:
        if handle in self.deaf:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        self.registered.add(handle)

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> Any:
        try:
            told = self.events.get(timeout=timeout_ms / 1000)
        except queue.Empty:
            raise self.NVMLError(self.NVML_ERROR_TIMEOUT) from None
        if isinstance(told, int):
            raise self.NVMLError(told)
        return SimpleNamespace(
            device=told[0], eventType=self.nvmlEventTypeXidCriticalError, eventData=told[1]
        )

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=4711, usedGpuMemory=GIB)]
