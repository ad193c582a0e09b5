# SPDX-License-Identifier: Apache-2.0
"""What each worker of this host would run on: its unit's number, and the administrator's own file for it.

``/etc/gpuinfer/worker@N.env`` is read as the unit reads it, and decided as the worker decides it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gpuinfer import instances as own
from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, error, ok
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.units import instances
from gpuinfer.errors import ConfigError, DeviceError
from gpuinfer.gpus import VISIBLE, Inventory, chosen, visible_device
from gpuinfer.settings import Settings, load

_NUMBER = re.compile(r"worker@(\d+)\.")


def bindings(host: Host) -> Findings:
    """Each worker that is enabled, or has a file of its own, gets a device and has valid settings."""
    numbers = _numbers(host)
    if not numbers:
        raise Skipped("no worker is enabled, none has a file of its own")
    _ = host.settings  # what is wrong in the file of all is no worker's fault: skipped, see config.file
    found = _inventory(host)
    return [_one(host, number, found) for number in numbers]


def served(host: Host) -> list[tuple[int, Settings]]:
    """Return the settings of all, as worker 0's, and those of each worker.

    Wrong ones are the business of ``bindings``.
    """
    found = [(0, host.settings)]
    for number in _numbers(host):
        with suppress(OSError, ConfigError):
            found.append((number, _settings(host, number)))
    return found


def _settings(host: Host, number: int) -> Settings:
    return load(environ=_environment(host, number)).settings


def _numbers(host: Host) -> list[int]:
    return sorted({*own.with_file(_folder(host)), *_enabled(host)})


def _folder(host: Host) -> Path:
    return host.path(own.FOLDER)


def _enabled(host: Host) -> list[int]:
    try:
        return [int(match[1]) for name in instances(host) if (match := _NUMBER.search(name))]
    except Skipped:
        return []


def _inventory(host: Host) -> Inventory:
    try:
        return host.gpus().inventory
    except Exception:
        raise Skipped("NVML cannot be asked; see gpu.driver") from None


def _one(host: Host, number: int, found: Inventory) -> Finding:
    file = own.file_of(number)
    try:
        for remark in own.remarks(number, _folder(host)):
            return error(f"{file}: {remark}", edit(file))
        environ = _environment(host, number)
        worker = load(environ=environ).settings.worker
        if worker.per_gpu != host.settings.worker.per_gpu:
            both = f"worker.per_gpu is {worker.per_gpu} here, and {host.settings.worker.per_gpu} for the host"
            return error(f"{file}: {both}; it must be the same for all its workers", edit(file))
        inventory = chosen(worker.gpus, found, worker.per_gpu)
        device = visible_device(number, worker, environ, inventory=inventory)
    except OSError as exc:
        raise Skipped(f"{file} cannot be read: {exc.strerror or exc}") from None
    except (ConfigError, DeviceError) as exc:
        fix = edit(file) if host.path(file).exists() else f"systemctl disable --now gpuinfer-worker@{number}"
        return error(f"worker {number}: {exc}", f"{fix}  # gpuinfer gpus lists what there is")
    name = device.gpu.name if device.gpu else device.cuda_visible_devices or "no GPU"
    return ok(f"worker {number} runs on {device.device} ({name})")


def _environment(host: Host, number: int) -> Mapping[str, str]:
    """Return what the unit's process would see."""
    named = os.environ.get("GPUINFER_CONFIG")
    environ = {"GPUINFER_CONFIG": named} if named else {}
    environ[VISIBLE] = str(number)
    return {**environ, **own.read(number, _folder(host))}
