# SPDX-License-Identifier: Apache-2.0
"""The operating system: room on disk, the journal, the clock, memory for forks."""

from __future__ import annotations

import os
import time

from gpuinfer.doctor.broker import asked, redis_folder
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped, error, ok, warning

_GIB = 1024**3
DATA, JOURNALD = "/var/lib/gpuinfer", "/etc/systemd/journald.conf.d/zz-gpuinfer.conf"
#: Below the first, Redis's next rewrite of its file may fail, and then it refuses writes.
ERROR_BYTES, WARNING_BYTES = _GIB // 2, 2 * _GIB
_WARNING_INODES = 1000
#: Of files that set the same, sysctl reads this one last.
_SYSCTL = "/etc/sysctl.d/99-zz-gpuinfer.conf"
_MAX_SKEW_S = 1.0


def data(host: Host) -> Findings:
    """There is room where Redis keeps the queue, and where the models are."""
    found, seen = [], set()
    for folder in (DATA, redis_folder(host)):
        path = host.path(folder)
        if path.exists() and (device := path.stat().st_dev) not in seen:
            seen.add(device)
            room = os.statvfs(path)
            inodes = room.f_favail if room.f_files else None
            found.append(judge(folder, room.f_bavail * room.f_frsize, inodes))
    if not found:
        raise Skipped(f"{DATA} is not there: the package is not installed")
    return found


def judge(folder: str, free: int, inodes: int | None) -> Finding:
    """Say whether that many bytes and inodes (None: no limit) are room enough."""
    text, look = f"{folder}: {free / _GIB:.1f} GiB free", f"du -xh --max-depth=2 {folder} | sort -h | tail"
    if free < ERROR_BYTES:
        return error(f"{text}; a full disk makes Redis refuse all writes (MISCONF)", look)
    if inodes is not None and inodes < _WARNING_INODES:
        return warning(f"{folder}: room for {inodes} more files", f"df -i {folder}")
    return warning(text, look) if free < WARNING_BYTES else ok(text)


def journal(host: Host) -> Finding:
    """The journal is written to disk, where it outlasts a reboot, and not to /run."""
    host.need_systemd()
    disk, run = (any(host.path(f"/{at}/log/journal").glob("*/system.journal")) for at in ("var", "run"))
    if disk and not run:
        return ok("the journal is kept on disk")
    keep = f"mkdir -p $(dirname {JOURNALD}) && printf '[Journal]\\nStorage=persistent\\n' >{JOURNALD}"
    fix = f"{keep} && systemctl restart systemd-journald && journalctl --flush"
    return warning("the journal is not kept on disk: it is lost at each reboot", fix)


def clocks(host: Host) -> Finding:
    """This host's clock and that of Redis's host agree."""
    with asked(host) as client:
        before = time.time()
        seconds, microseconds = client.time()
        after = time.time()
    skew = seconds + microseconds / 1e6 - (before + after) / 2
    if abs(skew) <= _MAX_SKEW_S + (after - before):
        return ok("this host's clock agrees with Redis's")
    text = f"Redis's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this host's"
    fix = "timedatectl set-ntp true && timedatectl status  # on both hosts"
    return warning(f"{text}: tasks expire that much too early or too late", fix)


def overcommit(host: Host) -> Finding:
    """vm.overcommit_memory = 1: a fork of Redis, which copies nothing at first, is never refused."""
    found = int(host.read("/proc/sys/vm/overcommit_memory"))
    if found == 1:
        return ok("vm.overcommit_memory = 1")
    text = f"vm.overcommit_memory = {found}: Redis may fail to fork, and then refuses writes; 1 is right"
    return warning(text, f"echo vm.overcommit_memory = 1 >>{_SYSCTL} && sysctl -p {_SYSCTL}")
