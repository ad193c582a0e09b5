# SPDX-License-Identifier: Apache-2.0
"""What each worker of this host would run on: its unit's number, and the administrator's own file for it.

``/etc/gpuinfer/worker@N.env`` is read as the unit reads it, and decided as the worker decides it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress

from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, error, ok
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.units import instances
from gpuinfer.errors import ConfigError, DeviceError
from gpuinfer.gpus import VISIBLE, Inventory, chosen, visible_device
from gpuinfer.settings import Settings, load

FOLDER = "/etc/gpuinfer"
_NUMBER = re.compile(r"worker@(\d+)\.")


def bindings(host: Host) -> Findings:
    """Each worker that is enabled, or has a file of its own, gets a device and has valid settings."""
    numbers = _numbers(host)
    if not numbers:
        raise Skipped("no worker is enabled, none has a file of its own")
    _ = host.settings  # what is wrong in the file of all is no worker's fault: skipped, see config.file
    found = _inventory(host)
    return [_one(host, number, found) for number in numbers]


def served(host: Host) -> list[Settings]:
    """Return the settings of all and those of each worker; wrong ones are the business of ``bindings``."""
    found = [host.settings]
    for number in _numbers(host):
        with suppress(ValueError, ConfigError):
            found.append(_settings(host, number))
    return found


def _settings(host: Host, number: int) -> Settings:
    return load(environ=_environment(host, f"{FOLDER}/worker@{number}.env", number)).settings


def _numbers(host: Host) -> list[int]:
    return sorted({*_with_file(host), *_enabled(host)})


def _with_file(host: Host) -> list[int]:
    names = (path.name for path in host.path(FOLDER).glob("worker@*.env"))
    return [int(match[1]) for name in names if (match := _NUMBER.match(name))]


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
    file = f"{FOLDER}/worker@{number}.env"
    try:
        environ = _environment(host, file, number)
        worker = load(environ=environ).settings.worker
        device = visible_device(number, worker, environ, inventory=chosen(worker.gpus, found))
    except ValueError as exc:
        return error(f"{file}: {exc}", edit(file))
    except (ConfigError, DeviceError) as exc:
        mend = edit(file) if host.path(file).exists() else f"systemctl disable --now gpuinfer-worker@{number}"
        return error(f"worker {number}: {exc}", f"{mend}  # gpuinfer gpus lists what there is")
    name = device.gpu.name if device.gpu else device.cuda_visible_devices or "no GPU"
    return ok(f"worker {number} runs on {device.device} ({name})")


def _environment(host: Host, file: str, number: int) -> Mapping[str, str]:
    """Return what the unit's process would see. Raises ValueError for a line that is no NAME=value."""
    named = os.environ.get("GPUINFER_CONFIG")
    environ = {"GPUINFER_CONFIG": named} if named else {}
    environ[VISIBLE] = str(number)
    path = host.path(file)
    return environ | (parse(path.read_text(encoding="utf-8")) if path.exists() else {})


def parse(text: str) -> dict[str, str]:
    """Read an EnvironmentFile= (systemd.exec(5)): NAME=value, quotes, # and ; comments."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip()[0] in "#;":
            continue
        name, equals, value = line.strip().partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"line {number} is no NAME=value, and systemd ignores it")
        found[name] = " ".join(shlex.split(value)) if value[:1] in "\"'" else value.strip()
    return found
