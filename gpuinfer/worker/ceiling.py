# SPDX-License-Identifier: Apache-2.0
"""The most memory that a worker's process may hold: past it, the process ends after its batch.

What counts is resident memory of the host (RSS), as it is now: neither its peak nor a GPU's memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gpuinfer.errors import ConfigError
from gpuinfer.log import get_logger

log = get_logger(__name__)

#: A worker that has grown past ``worker.max_memory_mb`` ends with it. No failure, and none of sysexits.h.
EX_GROWN = 80
#: A worker ends with it when a task ran past its hard time limit.
EX_HARD_LIMIT = 81
_MIB = 1024 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Return how much of the host's memory this process holds now (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


class Ceiling:
    """``worker.max_memory_mb`` of one process. A limit of 0 MiB is none."""

    def __init__(self, limit_mb: int, worker: str, resident: Callable[[], int] = resident_bytes) -> None:
        self.limit_mb = limit_mb
        self._worker = worker
        self._resident = resident

    def check_loaded(self) -> None:
        """Raise ConfigError where the process is past its limit before its first batch."""
        held_mb = self._resident() // _MIB
        if self.limit_mb and held_mb > self.limit_mb:
            raise ConfigError(
                f"= {self.limit_mb}: with its models loaded the worker holds {held_mb} MiB; "
                "allow as much again for its batches, or 0 for no limit",
                "worker.max_memory_mb",
            )

    def passed(self) -> bool:
        """Tell whether the process holds more than it may, and log it."""
        held_mb = self._resident() // _MIB
        if held_mb <= self.limit_mb:
            return False
        log.warning(
            "memory_limit",
            worker=self._worker,
            held_mb=held_mb,
            max_memory_mb=self.limit_mb,
            hint="it finishes its batch, hands the rest back, and is started anew",
        )
        return True
