# SPDX-License-Identifier: Apache-2.0
"""The demo's processes: a private Redis, workers, the API, and the model called directly.

    redis ─► api, workers, and the model called directly (side by side) ─► ... ─► api, workers ─► redis

The kernel picks the API's port.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gpuinfer.demo.private import (
    GPUINFER,
    GRACE_S,
    START_TIMEOUT_S,
    Private,
    Report,
    cleaning_up,
    private_folder,
)
from gpuinfer.demo.processes import Child, stop
from gpuinfer.gpu_binding import VISIBLE, check_visible, visible
from gpuinfer.gpus import Inventory, list_gpus

#: Name of the process that calls the model directly.
_DIRECT = "model"
#: Action of the log line that says a process is ready.
WORKER_READY, API_READY = "worker_ready", "listening"


@dataclass(frozen=True)
class Plan:
    """The devices of the workers."""

    #: Worker number -> name of its device; "CPU" without a GPU.
    devices: Mapping[int, str]
    #: GPUs for ``worker.gpus``, if the caller restricts them.
    gpus: tuple[str, ...] = ()
    #: Why an existing GPU is not used; empty otherwise.
    note: str = ""

    @property
    def summary(self) -> str:
        """The devices as text: ``GPU 0 (H200) and the CPU``."""
        names = list(dict.fromkeys(self.devices.values()))
        return " and ".join(("the CPU" if name == "CPU" else name) for name in names)


def plan(
    workers: int,
    environ: Mapping[str, str],
    list_gpus: Callable[[Sequence[str]], Inventory] = list_gpus,
) -> Plan:
    """Assign GPUs to workers, and the CPU to any left over. Honours CUDA_VISIBLE_DEVICES.

    Raises DeviceError if that variable names a device that does not exist.
    """
    found, names = list_gpus(()), visible(environ)
    if not found.gpus:
        note = f"the GPU cannot be used: {found.reason}" if found.failed else ""
        return Plan(dict.fromkeys(range(workers), "CPU"), note=note)
    if names == ():
        return Plan(dict.fromkeys(range(workers), "CPU"), note=f"{VISIBLE}={environ[VISIBLE]} hides the GPUs")
    check_visible(environ, inventory=found)
    if names:
        found = list_gpus(names)
    devices = {number: _device_name(found, number) for number in found.worker_numbers[:workers]}
    free = (number for number in itertools.count() if number not in devices)
    devices |= dict.fromkeys(itertools.islice(free, workers - len(devices)), "CPU")
    return Plan(devices, names or ())


def _device_name(found: Inventory, number: int) -> str:
    gpu = found.of_worker(number)
    return f"GPU {gpu.index} ({gpu.name})" if gpu and gpu.name else f"GPU {number}"


class Stack(Private):
    """The processes and the folder of a demo. Create it with ``started``."""

    def __init__(self, folder: Path, devices: Plan, report: Report) -> None:
        super().__init__(folder, {"worker": {"gpus": list(devices.gpus)}} if devices.gpus else {}, report)
        self.plan = devices
        #: Results of the model called directly, in the order of the images.
        self.direct: list[dict[str, Any]] = []
        self.workers: list[Child] = []

    def start(self) -> None:
        """Start everything and wait until all of it is ready. Raises ConfigError, ProcessEnded."""
        until = time.monotonic() + START_TIMEOUT_S
        self._start_redis(until)
        api = self._spawn("api", [*GPUINFER, "api", "--host", "127.0.0.1", "--port", "0"])
        for number, device in self.plan.devices.items():
            name = f"worker {number}"
            own = {} if device != "CPU" else {"GPUINFER_WORKER_DEVICE": "cpu", "GPUINFER_WORKER_THREADS": "1"}
            self.workers.append(self._spawn(name, [*GPUINFER, "worker", str(number)], own, f"on {device}"))
        target = self.folder / "direct.json"
        direct = self._spawn(
            _DIRECT, [sys.executable, "-m", "gpuinfer.demo.direct", str(target)], what="called directly"
        )
        ready = {api: API_READY, **dict.fromkeys(self.workers, WORKER_READY)}
        self._await_all(ready, direct, target, until)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield the workers' new ``batch_done`` log lines, one per batch."""
        for worker in self.workers:
            found = (entry for entry in worker.news() if entry.get("action") == "batch_done")
            yield from (entry for entry in found if entry.get("part", "1 ").startswith("1 "))

    def _await_all(self, ready: dict[Child, str], direct: Child, target: Path, until: float) -> None:
        """Wait for each log line in ``ready``, and for the results file of the direct call."""
        while ready or not self.direct:
            for child in [child for child, action in ready.items() if self._serves(child, action)]:
                del ready[child]
                self._report(child.name, "", True)
            if not self.direct and target.exists():
                self.direct = orjson.loads(target.read_bytes())
                self._front.remove(direct)
                stop([direct], GRACE_S)
                self._report(direct.name, "", True)
            if ready or not self.direct:
                self._pause(self._front, until, ", ".join(child.name for child in ready) or direct.name)

    def _may_end(self, child: Child) -> bool:
        return child.name == _DIRECT and not child.exit_code  # exits with 0 when it is done


@contextmanager
def started(devices: Plan, report: Report) -> Iterator[Stack]:
    """Yield a stack that is not started yet; clean up at the end."""
    stack = Stack(private_folder("gpuinfer-demo-"), devices, report)
    with cleaning_up(stack):
        yield stack
