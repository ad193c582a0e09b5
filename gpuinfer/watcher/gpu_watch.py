# SPDX-License-Identifier: Apache-2.0
"""A thread for NVML, whose calls block while a driver hangs: the watcher never waits for it.

It surveys all GPUs every few seconds, so that it also finds those of a driver that is loaded later, and
listens for Xid errors meanwhile. Until NVML's first answer nothing is known of any GPU. When NVML then does
not answer for half a minute, the driver hangs, and a worker would hang too: no GPU counts as healthy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Protocol

from gpuinfer.gpu_readings import Reading
from gpuinfer.gpus import PROGRAM_XIDS
from gpuinfer.log import get_logger
from gpuinfer.settings import Settings
from gpuinfer.watcher import health
from gpuinfer.watcher.state import GpuHealth
from gpuinfer.watcher.xids import Xids

log = get_logger(__name__)

#: GPUs are surveyed less often than queues: NVML may be slow.
EVERY_S = 5.0
#: The thread ends within this time after it is told to.
_SLICE_S = 1.0
#: A driver that has not answered for this long hangs.
SILENT_S = 30.0
#: At the start, wait this long at most for the first answer.
FIRST_S = 10.0


class Gpus(Protocol):
    """What the watcher needs to know of GPUs. Only ``start`` may take long."""

    #: The instances that this host has GPUs for, as far as is known.
    numbers: tuple[int, ...]

    def start(self) -> None:
        """Begin to survey."""

    def stop(self) -> None:
        """End soon."""

    def health(self, ours: Container[int], numbers: Iterable[int]) -> Mapping[int, GpuHealth]:
        """Return the health of these workers' GPUs, except healthy ones. ``ours``: those with a process."""

    def take_xids(self) -> dict[int, str]:
        """Return what went wrong with workers' GPUs since the last call: instance -> reason."""

    def readings(self) -> Sequence[Reading]:
        """Return what each GPU did at the last survey."""


class GpuWatch:
    """What is known of the health of a host's GPUs."""

    def __init__(
        self,
        settings: Settings,
        numbers: tuple[int, ...] = (),
        nvml: Any = None,
        clock: Callable[[], float] = time.monotonic,
        bound: Callable[[], Mapping[int, str]] = dict,
        on_xid: Callable[[int, int], None] = lambda gpu, xid: None,
    ) -> None:
        """``numbers``: the instances there are until NVML has answered.

        ``bound``: the devices that instances' own files name. ``on_xid(gpu, xid)`` is called in the thread
        for each Xid; ``gpu`` is NVML's index.
        """
        self._on_xid = on_xid
        self._settings = settings
        #: The instances that this host has GPUs for, as far as is known.
        self.numbers = numbers
        self._bound = bound
        self._nvml = nvml
        self._clock = clock
        self._ours: Container[int] = ()
        self._lock = threading.Lock()
        self._health: Mapping[int, GpuHealth] = {}
        self._readings: Sequence[Reading] = ()
        self._xids: dict[int, str] = {}
        self._answered_at = clock()
        self._first = threading.Event()
        self._stop = threading.Event()
        # A daemon: a thread that hangs in the driver must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def start(self) -> None:
        """Start the thread, unless no GPU is to be used."""
        if self._settings.worker.device != "cpu":
            self._answered_at = self._clock()
            self._thread.start()
            self._first.wait(FIRST_S)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * _SLICE_S)

    def health(self, ours: Container[int], numbers: Iterable[int]) -> Mapping[int, GpuHealth]:
        """Return the health of these workers' GPUs, except healthy ones. ``ours``: those with a process."""
        self._ours = ours
        with self._lock:
            if not self._thread.is_alive():
                return self._health
            if not self._first.is_set():
                return dict.fromkeys(numbers, GpuHealth(unknown="its GPU's driver has not answered NVML yet"))
            if self._clock() - self._answered_at > SILENT_S:
                return dict.fromkeys(numbers, GpuHealth(fault="its driver does not answer NVML"))
            return self._health

    def readings(self) -> Sequence[Reading]:
        """Return what each GPU did at the last survey; nothing while the driver does not answer."""
        with self._lock:
            return self._readings if self._clock() - self._answered_at <= SILENT_S else ()

    def take_xids(self) -> dict[int, str]:
        """Return the Xid errors of workers' GPUs since the last call: instance -> reason."""
        with self._lock:
            taken, self._xids = self._xids, {}
        return taken

    def _run(self) -> None:
        xids = None
        while not self._stop.is_set():
            try:
                xids = xids or Xids(self._nvml or health.pynvml(), self._clock)
                self._round(xids)
            except Exception:  # one survey that fails must not end the thread
                log.exception("gpu_survey_failed")
                self._stop.wait(EVERY_S)
        if xids is not None:
            xids.close()

    def _round(self, xids: Xids) -> None:
        seen = health.survey(self._settings, self._ours, self._nvml, self._bound())
        # A driver that fails for a moment takes no GPU away.
        numbers = tuple(sorted({*self.numbers, *seen.numbers})) if seen.failed else seen.numbers
        with self._lock:
            self._health, self._answered_at = seen.health, self._clock()
            if numbers != self.numbers:
                log.info("instances", numbers=list(numbers))
            self.numbers, self._readings = numbers, seen.readings
        self._first.set()
        until = self._clock() + EVERY_S
        while not self._stop.is_set() and (left := until - self._clock()) > 0:
            begun = self._clock()
            for index, xid in xids.wait(min(left, _SLICE_S)):
                self._note(seen.indices, index, xid)
            if self._clock() - begun < _SLICE_S / 10:  # there are no events to wait for, or too many
                self._stop.wait(_SLICE_S / 2)

    def _note(self, indices: Mapping[int, int], index: int, xid: int) -> None:
        self._on_xid(index, xid)
        if xid in PROGRAM_XIDS:
            log.info("gpu_xid", gpu=index, xid=xid, reason=f"{PROGRAM_XIDS[xid]}: a fault of the program")
            return
        log.warning("gpu_xid", gpu=index, xid=xid, hint="https://docs.nvidia.com/deploy/xid-errors")
        with self._lock:
            for number in (number for number, gpu in indices.items() if gpu == index):
                before = self._xids.get(number)
                told = f"Xid {xid}"
                if before is None or told not in before.split(", "):
                    self._xids[number] = f"{before}, {told}" if before else told
