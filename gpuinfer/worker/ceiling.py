# SPDX-License-Identifier: Apache-2.0
"""The memory limit of a worker process: if exceeded, the process exits after its batch.

The limit is for the current resident host memory (RSS), not for its peak or GPU memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gpuinfer.errors import ConfigError
from gpuinfer.log import get_logger

log = get_logger(__name__)

#: Exit code of a worker that exceeded ``worker.max_memory_mb``. Not a failure, and not from sysexits.h.
EX_GROWN = 80
#: Exit code of a worker in which a task exceeded its hard time limit.
EX_HARD_LIMIT = 81
_MIB = 1024 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Return this process's resident memory in bytes (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


class Ceiling:
    """``worker.max_memory_mb`` of one process; 0: no limit."""

    def __init__(self, limit_mb: int, worker: str, resident: Callable[[], int] = resident_bytes) -> None:
        self.limit_mb = limit_mb
        self._worker = worker
        self._resident = resident

    def check_loaded(self) -> None:
        """Raise ConfigError if the process exceeds its limit before its first batch."""
        held_mb = self._resident() // _MIB
        if self.limit_mb and held_mb > self.limit_mb:
            raise ConfigError(
                f"= {self.limit_mb}: the worker uses {held_mb} MiB with its models loaded; "
                "set at least twice as much, to leave memory for batches, or 0 for no limit",
                "worker.max_memory_mb",
            )

    def passed(self) -> bool:
        """Whether the process exceeds its limit; logs it."""
        held_mb = self._resident() // _MIB
        if held_mb <= self.limit_mb:
            return False
        log.warning(
            "memory_limit",
            worker=self._worker,
            held_mb=held_mb,
            max_memory_mb=self.limit_mb,
            hint="it finishes its batch, returns its other tasks and restarts",
        )
        return True
