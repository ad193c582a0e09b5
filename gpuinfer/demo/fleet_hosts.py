# SPDX-License-Identifier: Apache-2.0
"""Hosts of a simulated fleet: the real watcher, simulated units, and GPUs that warm up under load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Container, Iterable, Mapping, Sequence

from gpuinfer.demo.fleet_workers import FleetUnits, FleetWorker
from gpuinfer.gpu_readings import Reading
from gpuinfer.settings import Settings
from gpuinfer.watcher.main import Watcher
from gpuinfer.watcher.state import GpuHealth

_GIB = 1024**3
_TOTAL = 80 * _GIB
_COOL_C, _HOT_C = 38, 74
#: Model -> memory that it holds on a GPU.
_HOLDS = {"resnet": 3 * _GIB, "whisper": 14 * _GIB, "embed": 6 * _GIB}


class FleetGpus:
    """The simulated GPUs of one host, instead of the NVML thread."""

    def __init__(self, workers: Mapping[int, FleetWorker]) -> None:
        self.numbers = tuple(workers)
        self._workers = workers
        self._looked = dict.fromkeys(workers, (time.monotonic(), 0.0, 0.0))
        self._heat = dict.fromkeys(workers, float(_COOL_C))
        #: Instance -> fault of its GPU.
        self.faults: dict[int, str] = {}
        #: Instance -> Xid of its GPU since the last call.
        self.xids: dict[int, str] = {}

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def health(self, ours: Container[int], numbers: Iterable[int]) -> Mapping[int, GpuHealth]:
        """Return the health of faulty GPUs."""
        return {number: GpuHealth(fault=fault) for number, fault in self.faults.items()}

    def take_xids(self) -> dict[int, str]:
        """Return the Xids since the last call."""
        taken, self.xids = self.xids, {}
        return taken

    def readings(self) -> Sequence[Reading]:
        """Return each GPU's readings."""
        return [self._reading(number, worker) for number, worker in self._workers.items()]

    def _reading(self, number: int, worker: FleetWorker) -> Reading:
        at, computed_s, busy = self._looked[number]
        now = time.monotonic()
        if now - at >= 1.0:
            busy = min(1.0, (worker.computed_s - computed_s) / (now - at))
            self._looked[number] = now, worker.computed_s, busy
            self._heat[number] += ((_COOL_C + busy * (_HOT_C - _COOL_C)) - self._heat[number]) / 4
        runs = worker.state == "active"
        return {
            "index": number,
            "name": "NVIDIA H100 80GB HBM3",
            "workers": [number],
            "memory_used": sum(_HOLDS.get(model, _GIB) for model in worker.models) if runs else _GIB // 2,
            "memory_total": _TOTAL,
            "temperature_c": round(self._heat[number]),
            "busy": round(busy, 3),
        }


class FleetHost:
    """One host: a thread that runs a watcher."""

    def __init__(self, settings: Settings, name: str, serves: Mapping[int, Sequence[str]]) -> None:
        """``serves``: instance -> its models."""
        self.name = name
        self.workers = {
            number: FleetWorker(settings, number, name, models) for number, models in serves.items()
        }
        self.gpus = FleetGpus(self.workers)
        self._settings = settings
        self._serves = serves
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the watcher; it starts the workers."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the watcher, then the workers."""
        if self._loop is not None and self._ended is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._watch())

    async def _watch(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        units = FleetUnits(self.workers)
        watcher = Watcher(
            self._settings,
            units,
            tuple(self.workers),
            act=True,
            tell=True,
            host=self.name,
            environment=self._environment,
            gpus=self.gpus,
        )
        try:
            await watcher.run(self._ended)
        finally:
            await units.close()

    def _environment(self, number: int) -> Mapping[str, str]:
        return {"GPUINFER_WORKER_MODELS": ",".join(self._serves[number])}
