# SPDX-License-Identifier: Apache-2.0
"""Xid errors from NVML: an event set that every GPU is registered with.

It works without privileges, unlike the kernel's log. Of a GPU that is split by MIG, NVML reports only errors
of the whole GPU; earlier errors are not reported. While the set is open the driver is in use, as by any
worker: to reset a GPU or to unload the driver, stop the watcher too.

Source: https://docs.nvidia.com/deploy/nvml-api/group__nvmlEvents.html
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gpuinfer.log import get_logger

log = get_logger(__name__)

#: After an error the event set is opened again, at most this often.
AGAIN_S = 30.0
#: At most this many events are taken at once.
_MOST = 100


class Xids:
    """The events of all GPUs. Blocking: use it in one thread of its own."""

    def __init__(self, nvml: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._clock = clock
        self._set: Any = None
        self._by_address: dict[int | None, int] = {}
        self._again_at = clock()

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """Return (GPU's index, Xid) of new events; wait for them this long at most. Never raises.

        Returns at once when there are no events to wait for: no driver, or no GPU that reports any.
        """
        if self._set is None and not self._open():
            return []
        found: list[tuple[int, int]] = []
        try:
            while len(found) < _MOST:
                event = self._nvml.nvmlEventSetWait_v2(self._set, 0 if found else int(seconds * 1000))
                if event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                    found += [(index, int(event.eventData)) for index in self._whose(event.device)]
        except self._nvml.NVMLError as exc:
            if exc.value != self._nvml.NVML_ERROR_TIMEOUT:
                log.warning("xids_lost", reason=str(exc), hint="asked again later")
                self.close()
        return found

    def close(self) -> None:
        """Release the driver."""
        if self._set is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._set)
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._set = None

    def _open(self) -> bool:
        if self._clock() < self._again_at:
            return False
        self._again_at = self._clock() + AGAIN_S
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            return False  # the inventory has the reason
        try:
            self._set = self._nvml.nvmlEventSetCreate()
            self._by_address = {}
            for index in range(self._nvml.nvmlDeviceGetCount()):
                with suppress(self._nvml.NVMLError):  # a GPU that is lost, or reports no events
                    self._register(index)
        except self._nvml.NVMLError as exc:
            log.warning("xids_unheard", reason=str(exc))
        if not self._by_address:
            if self._set is None:
                self._nvml.nvmlShutdown()
            self.close()
        return self._set is not None

    def _register(self, index: int) -> None:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        self._nvml.nvmlDeviceRegisterEvents(handle, self._nvml.nvmlEventTypeXidCriticalError, self._set)
        self._by_address[_address(handle)] = index

    def _whose(self, device: Any) -> list[int]:
        """Return the GPU's index. If a lost GPU does not report it, return all of them."""
        known = self._by_address.get(_address(device))
        if known is not None:
            return [known]
        try:
            return [int(self._nvml.nvmlDeviceGetIndex(device))]
        except self._nvml.NVMLError:
            return sorted(self._by_address.values())


def _address(handle: Any) -> int | None:
    """Return what an NVML handle points to: handles themselves do not compare."""
    return ctypes.cast(handle, ctypes.c_void_p).value
