# SPDX-License-Identifier: Apache-2.0
"""What a run ran on: versions, processor, cores; and what one process has used of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import gpuinfer
from tests.services import ServiceError, redis_binary

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: The cores this run may use, as they were before anything was pinned.
_CORES = sorted(os.sched_getaffinity(0))
#: Redis and the client share one core, the worker (or the bare loop) has another.
CLIENT_CORE, WORKER_CORE = _CORES[0], _CORES[-1]


def versions() -> dict[str, str]:
    """Return the versions of everything that is measured."""
    binary = redis_binary()
    if binary is None:
        raise ServiceError("there is no redis-server")
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\S+)", answer)
    return {
        "gpuinfer": gpuinfer.__version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in ("celery", "kombu")},
        "redis-py": version("redis"),
        "redis-server": found.group(1) if found else answer.strip(),
        "torch": version("torch"),
    }


def machine() -> dict[str, str | int | float]:
    """Return the processor's model, how many cores there are, and the kernel."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"model name\s*:\s*(.+)", text)
    return {
        "cpu": found.group(1) if found else platform.machine(),
        "cores": len(_CORES),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def stolen_seconds() -> float:
    """Return the processor time since its start that the machine under this one has given to others."""
    fields = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
    return int(fields[8]) / _TICKS_PER_S


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run the calling thread, and what it starts meanwhile, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def unpinned() -> Iterator[None]:
    """Run the calling thread, and what it starts meanwhile, on all cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds(pid: int) -> float:
    """Return the processor time a process has used, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    if found is None:
        raise ServiceError(f"process {pid} is gone")
    return int(found.group(1)) / 1024
