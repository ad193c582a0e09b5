# SPDX-License-Identifier: Apache-2.0
"""What this host's workers run with: the settings, each one's own file, a device, and sound models.

``/etc/gpuinfer/worker@N.env`` is read as the unit reads it, and decided as the worker decides it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress

from gpuinfer import instances as own
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped, error, ok, warning
from gpuinfer.doctor.units import NUMBER, instances
from gpuinfer.errors import ConfigError, DeviceError, DigestMismatch, ModelError, ModelNotAdded, UnknownModel
from gpuinfer.gpu_binding import VISIBLE, visible_device
from gpuinfer.gpus import Inventory, chosen
from gpuinfer.models.repository import ModelFolder, Repository, verify
from gpuinfer.settings import Settings, load

#: Hashing a large model takes its time.
DIGEST_LIMIT_S = 120.0


def file(host: Host) -> Finding:
    """The settings file, the variables and the credentials are valid."""
    try:
        changed = len(host.loaded.changed)
    except ConfigError as exc:
        where = exc.field or exc.message.partition(":")[0]
        fix = f"editor {where}" if where.startswith("/") else f"unset {where}"
        return error(str(exc), f"{fix} && gpuinfer config check")
    return ok(f"settings are valid, {changed} of them changed")


def bindings(host: Host) -> Findings:
    """Each worker that is enabled, or that the settings name, gets a device and has valid settings."""
    worker, found = host.settings.worker, host.gpus().inventory
    numbers = sorted({*_numbers(host), *range(len(worker.gpus) * worker.per_gpu)})
    if not numbers:
        raise Skipped("no worker is enabled, none has a file of its own")
    if found.failed and not found.broken:
        raise Skipped("NVML cannot be asked; see gpu.driver")
    return [_binding(host, number, found) for number in numbers]


def _binding(host: Host, number: int, found: Inventory) -> Finding:
    file = own.file_of(number)
    try:
        for remark in own.remarks(number, host.path(own.FOLDER)):
            return error(f"{file}: {remark}", f"editor {file}")
        environ = _environment(host, number)
        worker, of_all = load(environ=environ).settings.worker, host.settings.worker
        if worker.per_gpu != of_all.per_gpu:
            both = f"worker.per_gpu is {worker.per_gpu} here and {of_all.per_gpu} for the host"
            return error(f"{file}: {both}; it must be the same for all workers of a host", f"editor {file}")
        inventory = chosen(worker.gpus, found, worker.per_gpu)
        device = visible_device(number, worker, environ, inventory=inventory)
    except OSError as exc:
        raise Skipped(f"{file} cannot be read: {exc.strerror or exc}") from None
    except (ConfigError, DeviceError) as exc:
        there = host.path(file).exists()
        fix = f"editor {file}" if there else f"systemctl disable --now gpuinfer-worker@{number}"
        return error(f"worker {number}: {exc}", f"{fix}  # gpuinfer gpus lists what there is")
    name = device.gpu.name if device.gpu else device.cuda_visible_devices or "no GPU"
    return ok(f"worker {number} runs on {device.device} ({name})")


def served(host: Host) -> list[tuple[int, Settings]]:
    """Return the settings of all, as worker 0's, and of each worker whose settings are valid."""
    found = [(0, host.settings)]
    for number in _numbers(host):
        with suppress(OSError, ConfigError):  # ``bindings`` reports it
            found.append((number, load(environ=_environment(host, number)).settings))
    return found


def _numbers(host: Host) -> set[int]:
    """Return the workers that are enabled, or have a file of their own."""
    numbers = {*own.with_file(host.path(own.FOLDER))}
    with suppress(Skipped):
        numbers |= {int(match[1]) for name in instances(host) if (match := NUMBER.search(name))}
    return numbers


def _environment(host: Host, number: int) -> Mapping[str, str]:
    """Return what the unit's process would see."""
    environ = {name: value for name, value in os.environ.items() if name == "GPUINFER_CONFIG"}
    return {**environ, VISIBLE: str(number), **own.read(number, host.path(own.FOLDER))}


def digests(host: Host) -> Findings:
    """Each model's folder has the digest it had when it was added and tried, and only root may change it."""
    wanted = [(of.models.folders, name) for _, of in served(host) for name in of.worker.models]
    return [_digest(Repository(folders), name) for folders, name in dict.fromkeys(wanted)]


def _digest(repository: Repository, name: str) -> Finding:
    try:
        folder = repository.get(name)
        verify(folder)
    except UnknownModel as exc:
        return error(exc.message, f"gpuinfer model add FOLDER --name {name}  # or another worker.models")
    except DigestMismatch as exc:
        return error(f"{name}: {exc.message}", f"gpuinfer model add FOLDER --name {name} --force")
    except ModelNotAdded as exc:
        return error(f"{name}: {exc.message}", exc.message.partition("run: ")[2])
    except ModelError as exc:
        return error(str(exc), f"gpuinfer model show {name}")
    return _open_to_others(folder) or ok(f"{name} has the digest it was added with")


def _open_to_others(folder: ModelFolder) -> Finding | None:
    """Return a warning where another than root and us may change a model, or exchange its folder."""
    place = folder.path.resolve()
    for path in (*sorted(place.rglob("*")), place, *place.parents):
        status, within = path.stat(), place == path or place in path.resolve().parents
        who = "" if status.st_uid in (0, os.geteuid()) else f"user {status.st_uid}"
        # In a sticky folder each keeps his own.
        if status.st_mode & 0o022 and not (path.is_dir() and status.st_mode & stat.S_ISVTX):
            who = "its group or everybody"
        if who:
            text = f"{folder.manifest.name}: {path} can be changed by {who}: a model is a program"
            all_, what = ("-R ", folder.path) if within else ("", path)
            fix = f"chown {all_}root:root {what} && chmod {all_}go-w {what}"
            return warning(f"{text} that workers run", fix)
    return None
