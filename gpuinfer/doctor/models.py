# SPDX-License-Identifier: Apache-2.0
"""The models the workers of this host load: there, whole, safe from others, and loadable."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gpuinfer.doctor import bindings
from gpuinfer.doctor.finding import Finding, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.errors import DigestMismatch, GpuinferError, ModelError, ModelNotAdded, UnknownModel
from gpuinfer.models import sandbox
from gpuinfer.models.repository import ModelFolder, Repository, verify

LOAD_LIMIT_S = 120.0
#: A model is loaded only where there is this many times its size of free memory.
_ROOM = 3
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def digests(host: Host) -> Sequence[Finding]:
    """Each model's folder has the digest it had when it was added."""
    return _each(host, _digest)


def loads(host: Host) -> Sequence[Finding]:
    """Each model can be loaded and run once, on the CPU, in the workers' sandbox."""
    return _each(host, partial(_load, host))


def _each(host: Host, look: Callable[[ModelFolder], Finding]) -> list[Finding]:
    wanted = dict.fromkeys(
        (settings.models.folders, name)
        for _, settings in bindings.served(host)
        for name in settings.worker.models
    )
    return [_one(Repository(folders), name, look) for folders, name in wanted]


def _one(repository: Repository, name: str, look: Callable[[ModelFolder], Finding]) -> Finding:
    try:
        return look(repository.get(name))
    except UnknownModel as exc:
        return error(exc.message, f"gpuinfer model add FOLDER --name {name}  # or another worker.models")
    except DigestMismatch as exc:
        return error(f"{name}: {exc.message}", f"gpuinfer model add FOLDER --name {name} --force")
    except ModelNotAdded as exc:
        return error(f"{name}: {exc.message}", exc.message.partition("run: ")[2])
    except ModelError as exc:
        return error(str(exc), f"gpuinfer model show {name}")


def _digest(folder: ModelFolder) -> Finding:
    verify(folder)
    name = folder.manifest.name
    place = folder.path.resolve()
    for path in (*sorted(place.rglob("*")), place, *place.parents):
        writers = _strangers(path)
        if writers:
            within = path == place or place in path.resolve().parents
            return warning(
                f"{name}: {path} can be changed by {writers}: a model is a program that workers run",
                f"chown -R root:root {folder.path} && chmod -R go-w {folder.path}"
                if within
                else f"chown root:root {path} && chmod go-w {path}",
            )
    return ok(f"{name} has the digest it was added with")


def _strangers(path: Path) -> str:
    """Name who beside root and us may write a path; empty when nobody may.

    In a sticky folder each keeps his own.
    """
    status = path.stat()
    if status.st_mode & _OTHERS_MAY_WRITE and not (path.is_dir() and status.st_mode & stat.S_ISVTX):
        return "its group or everybody"
    return "" if status.st_uid in (0, os.geteuid()) else f"user {status.st_uid}"


def _available_bytes(host: Host) -> int:
    found = re.search(r"(?m)^MemAvailable:\s+(\d+) kB", host.read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else 0


def _load(host: Host, folder: ModelFolder) -> Finding:
    name = folder.manifest.name
    size = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    if size * _ROOM > _available_bytes(host):
        return Finding(
            "skipped", f"{name} has {size / 1024**3:.1f} GiB: too much to load beside what runs here"
        )
    try:
        answer = sandbox.ask(
            "attempt", limit_s=LOAD_LIMIT_S, quiet=True, folder=str(folder.path), device="cpu"
        )
    except GpuinferError as exc:
        return error(f"{name} cannot be loaded and run: {exc.message}", f"gpuinfer model check {name}")
    if answer["warnings"]:
        said = "; ".join(answer["warnings"])
        return warning(f"{name} loads on the CPU, but {said}", f"gpuinfer model show {name}")
    return ok(f"{name} loads and runs on the CPU ({answer['load_ms'] + answer['warm_up_ms']:.0f} ms)")
