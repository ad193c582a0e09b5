# SPDX-License-Identifier: Apache-2.0
"""The GPUs' device nodes, and whether the worker's user may use them."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Collection
from pathlib import Path

from gpuinfer.doctor.finding import Finding, Findings, Skipped, error, ok
from gpuinfer.doctor.host import Host
from gpuinfer.privileges import WORKER_USER, worker_user

#: Made by nvidia-modprobe, not by the kernel: missing until somebody has run a CUDA program as root.
NEEDED = ("/dev/nvidiactl", "/dev/nvidia-uvm")
SCRIPT = "/usr/lib/gpuinfer/bin/make-device-nodes"
#: The same where the package is not installed. 255 is the control device; -u makes those of memory alone.
_BY_HAND = (
    "nvidia-modprobe -c 255 $(sed -n 's/^Device Minor:/-c/p' /proc/driver/nvidia/gpus/*/information)"
    " && nvidia-modprobe -u -c 0"
)


def nodes(host: Host) -> Findings:
    """/dev/nvidia* are there, and the worker's user may read and write them."""
    gpus = sorted(str(path.relative_to(host.root)) for path in host.path("/dev").glob("nvidia[0-9]*"))
    if not gpus and not host.may_have_gpus():
        raise Skipped("no NVIDIA GPU, no device nodes")
    user = worker_user() or pwd.getpwuid(os.geteuid())
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    paths = [*(f"/{name}" for name in gpus), *NEEDED]
    make = SCRIPT if host.path(SCRIPT).exists() else _BY_HAND
    make += " && systemctl enable --now nvidia-persistenced"
    found = [_look(host.path(path), path, user, groups, make) for path in paths]
    if not gpus:
        found.append(error("there is no /dev/nvidia<N>", make))
    bad = [finding for finding in found if finding]
    return bad or ok(f"{len(paths)} device nodes, open to {user.pw_name}")


def _look(
    path: Path, shown: str, user: pwd.struct_passwd, groups: Collection[int], make: str
) -> Finding | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return error(f"{shown} is missing", make)
    except OSError as exc:
        return error(f"{shown}: {exc.strerror}", f"ls -l {shown}")
    if may_use(status, user.pw_uid, groups):
        return None
    mode = stat.filemode(status.st_mode)
    fix = f"chmod 0666 {shown}"
    if status.st_mode & 0o060 == 0o060 and status.st_gid != 0 and user.pw_name == WORKER_USER:
        fix = f"usermod -aG $(stat -c %G {shown}) {WORKER_USER} && systemctl restart gpuinfer-workers.target"
    return error(f"{shown} ({mode}) is closed to user {user.pw_name}", fix)


def may_use(status: os.stat_result, uid: int, groups: Collection[int]) -> bool:
    """Tell whether a user may read and write a file, by its mode bits."""
    if uid == 0:
        return True
    if status.st_uid == uid:
        wanted = 0o600
    elif status.st_gid in groups:
        wanted = 0o060
    else:
        wanted = 0o006
    return status.st_mode & wanted == wanted
