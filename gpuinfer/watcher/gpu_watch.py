# SPDX-License-Identifier: Apache-2.0
"""A thread of its own for NVML, which may block for as long as a driver hangs: the watcher never waits.

It looks at all GPUs every few seconds and listens for Xid errors meanwhile. When it has not come back for
half a minute, the driver hangs, and so would a worker: then no GPU is well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Mapping
from typing import Any

from gpuinfer.log import get_logger
from gpuinfer.settings import Settings
from gpuinfer.watcher import health
from gpuinfer.watcher.state import GpuHealth
from gpuinfer.watcher.xids import PROGRAMS, Xids

log = get_logger(__name__)

#: GPUs are asked less often than queues: NVML may take its time.
EVERY_S = 5.0
#: The thread sees within this time that it is to end.
_SLICE_S = 1.0
SILENT_S = 30.0
#: At the beginning, the first look is waited for, but no longer.
FIRST_S = 10.0


class GpuWatch:
    """What is known of the health of a host's GPUs."""

    def __init__(
        self,
        settings: Settings,
        numbers: tuple[int, ...],
        nvml: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._numbers = numbers
        self._nvml = nvml
        self._clock = clock
        self._ours: Container[int] = ()
        self._lock = threading.Lock()
        self._health: Mapping[int, GpuHealth] = {}
        self._xids: dict[int, str] = {}
        self._answered_at = clock()
        self._first = threading.Event()
        self._stop = threading.Event()
        # A daemon: a thread that hangs in the driver must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def start(self) -> None:
        """Begin to look, unless no GPU is to be used."""
        if self._settings.worker.device != "cpu":
            self._answered_at = self._clock()
            self._thread.start()
            self._first.wait(FIRST_S)

    def stop(self) -> None:
        """End, soon."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * _SLICE_S)

    def health(self, ours: Container[int]) -> Mapping[int, GpuHealth]:
        """Return the health of workers' GPUs that are not well. ``ours``: instances that have a process."""
        self._ours = ours
        with self._lock:
            silent = not self._first.is_set() or self._clock() - self._answered_at > SILENT_S
            if silent and self._thread.is_alive():
                fault = GpuHealth(fault="its driver does not answer NVML")
                return dict.fromkeys(self._numbers, fault)
            return self._health

    def take_xids(self) -> dict[int, str]:
        """Return what went wrong with workers' GPUs since the last call: instance -> reason."""
        with self._lock:
            taken, self._xids = self._xids, {}
        return taken

    def _run(self) -> None:
        xids = None
        while not self._stop.is_set():
            try:
                xids = xids or Xids(self._nvml or health.pynvml(), self._clock)
                self._round(xids)
            except Exception:  # a look that fails must not end the thread; the next one may go well
                log.exception("gpu_look_failed")
                self._stop.wait(EVERY_S)
        if xids is not None:
            xids.close()

    def _round(self, xids: Xids) -> None:
        look = health.survey(self._settings, self._ours, self._nvml)
        with self._lock:
            self._health, self._answered_at = look.health, self._clock()
        self._first.set()
        until = self._clock() + EVERY_S
        while not self._stop.is_set() and (left := until - self._clock()) > 0:
            begun = self._clock()
            for index, xid in xids.wait(min(left, _SLICE_S)):
                self._note(look.indices, index, xid)
            if self._clock() - begun < _SLICE_S / 10:  # nothing to wait for, or a flood of it
                self._stop.wait(_SLICE_S / 2)

    def _note(self, indices: Mapping[int, int], index: int, xid: int) -> None:
        if xid in PROGRAMS:
            log.info("gpu_xid", gpu=index, xid=xid, reason=f"{PROGRAMS[xid]}: the program's own fault")
            return
        log.warning("gpu_xid", gpu=index, xid=xid, hint="https://docs.nvidia.com/deploy/xid-errors")
        with self._lock:
            for number in (number for number, gpu in indices.items() if gpu == index):
                before = self._xids.get(number)
                told = f"Xid {xid}"
                if before is None or told not in before.split(", "):
                    self._xids[number] = f"{before}, {told}" if before else told
