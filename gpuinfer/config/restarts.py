# SPDX-License-Identifier: Apache-2.0
"""The units that run with older settings than the files have."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpuinfer.journal.units import read_units

#: Section -> the units that read it at their start. The watcher reads [worker] and [models] again by itself.
READERS: Mapping[str, tuple[str, ...]] = {
    "broker": ("gpuinfer-redis", "gpuinfer-api", "gpuinfer-watcher", "gpuinfer-worker@"),
    "redis": ("gpuinfer-redis",),
    "queue": ("gpuinfer-api", "gpuinfer-watcher", "gpuinfer-worker@"),
    "models": ("gpuinfer-worker@",),
    "worker": ("gpuinfer-worker@",),
    "api": ("gpuinfer-api",),
    "watcher": ("gpuinfer-watcher",),
    "log": ("gpuinfer-api", "gpuinfer-watcher", "gpuinfer-worker@"),
}
_LIMIT_S = 10.0


def started() -> dict[str, float]:
    """Return unit -> Unix time at which its process started, for gpuinfer's running units.

    Empty where systemd does not run or does not answer.
    """
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemctl") is None:
        return {}
    patterns = sorted({f"{unit}*.service" for units in READERS.values() for unit in units})
    command = ["systemctl", "show", "--property=Id,ActiveState,ExecMainStartTimestampMonotonic", *patterns]
    try:
        said = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(_running(said, time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)))


def _running(said: str, boot: float) -> Iterator[tuple[str, float]]:
    for unit in read_units(said):
        if unit.get("ActiveState") in ("active", "activating", "reloading"):
            yield (
                unit["Id"].removesuffix(".service"),
                boot + int(unit["ExecMainStartTimestampMonotonic"]) / 1e6,
            )


def changed_since(
    now: Mapping[str, Mapping[str, Any]], then: Mapping[str, Mapping[str, Any]] | None
) -> set[str]:
    """Return the sections that differ; without ``then``, those in which anything is set."""
    if then is None:
        return {section for section, values in now.items() if values}
    return {section for section in {*now, *then} if now.get(section, {}) != then.get(section, {})}


def needed(
    running: Mapping[str, float],
    file: float,
    sections: Iterable[str],
    workers: Mapping[int, float],
) -> list[str]:
    """Return the units to restart.

    All times are Unix times. ``running``: unit -> its start; ``file``: the last change of the settings file;
    ``sections``: the changed sections; ``workers``: worker number -> the last change of its own file.
    """
    readers = {unit for section in sections for unit in READERS.get(section, ())}
    found = []
    for unit, since in sorted(running.items()):
        name, at, number = unit.partition("@")
        own = workers.get(int(number), 0.0) if at and number.isdigit() else 0.0
        if (name + at in readers and since < file) or since < own:
            found.append(unit)
    return found
