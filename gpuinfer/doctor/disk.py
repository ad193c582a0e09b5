# SPDX-License-Identifier: Apache-2.0
"""Room on disk, for what Redis and the journal write."""

from __future__ import annotations

import os

from gpuinfer.doctor.finding import Finding, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host

_GIB = 1024**3
DATA, JOURNAL = "/var/lib/gpuinfer", "/var/log/journal"
#: Below the first, Redis's next rewrite of its file may fail, and then it refuses writes.
ERROR_BYTES, WARNING_BYTES = _GIB // 2, 2 * _GIB
_WARNING_INODES = 1000


def data(host: Host) -> Finding:
    """There is room where Redis keeps the queue, and where the models lie."""
    return _room(host, DATA, f"du -xh --max-depth=2 {DATA} | sort -h | tail")


def journal(host: Host) -> Finding:
    """There is room for the journal, and it is kept over a reboot."""
    host.need_systemd()
    if not host.path(JOURNAL).is_dir():
        return warning(
            "the journal is lost at each reboot: /var/log/journal is not there",
            "mkdir -p /var/log/journal && systemd-tmpfiles --create --prefix /var/log/journal "
            "&& systemctl kill -s SIGUSR1 systemd-journald",
        )
    return _room(host, JOURNAL, "journalctl --disk-usage && journalctl --vacuum-size=500M")


def _room(host: Host, folder: str, remedy: str) -> Finding:
    try:
        found = os.statvfs(host.path(folder))
    except FileNotFoundError:
        raise Skipped(f"{folder} is not there: the package is not installed") from None
    return judge(folder, found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None, remedy)


def judge(folder: str, free: int, inodes: int | None, remedy: str) -> Finding:
    """Say whether that is room enough."""
    text = f"{folder}: {free / _GIB:.1f} GiB free"
    if free < ERROR_BYTES:
        return error(f"{text}; a full disk makes Redis refuse all writes (MISCONF)", remedy)
    if inodes is not None and inodes < _WARNING_INODES:
        return warning(f"{folder}: {inodes} files can still be made", f"df -i {folder}")
    return warning(text, remedy) if free < WARNING_BYTES else ok(text)
