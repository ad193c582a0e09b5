# SPDX-License-Identifier: Apache-2.0
"""Free space on Redis's disk before its start: with ``appendfsync always`` Redis exits on a full disk.

``redis prepare`` does not let Redis start while the disk is full, and writes a notice beside the socket; the
front shows its text in the 503. The first attempt fails at once, so that a boot does not wait for it.
Started again by systemd, it waits for free space, and logs that once a minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from sdnotify import SystemdNotifier

from gpuinfer.errors import DiskFull
from gpuinfer.journal.sender import say_warning

#: Bytes that must be free; on a small disk, a twentieth of its size.
ROOM = 64 * 1024 * 1024
#: File name of the notice, in the folder of the socket.
NOTICE = "notice"
#: Seconds between two checks, between two log lines, and until it fails (less than TimeoutStartSec).
LOOK_S, TELL_S, WAIT_S = 1.0, 60.0, 840.0
_MIB = 1024 * 1024


def lacking(folder: Path) -> str:
    """Return that a folder's disk is full, in a sentence; empty where it is not. Raises OSError."""
    found = os.statvfs(folder)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    wanted = min(ROOM, total // 20)
    if free >= wanted:
        return ""
    return (
        f"the disk of {folder} is full ({free // _MIB} MiB free, {max(1, wanted // _MIB)} wanted); "
        "Redis starts by itself once there is room"
    )


def wait_for_room(
    folder: Path,
    notice: Path,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    lacking: Callable[[Path], str] = lacking,
) -> None:
    """Wait for free space. Raises DiskFull: at once where there is no notice, else after ``WAIT_S``."""
    reason = lacking(folder)
    first = not notice.exists()
    if reason and first:
        leave(notice, reason)
        raise DiskFull(reason)
    began = told = clock()
    while reason:
        SystemdNotifier().notify(f"STATUS={reason}")
        if clock() - began >= WAIT_S:
            raise DiskFull(reason)
        if clock() - told >= TELL_S:
            told = clock()
            say_warning(reason)
        sleep(LOOK_S)
        reason = lacking(folder)
    if not first:
        notice.unlink(missing_ok=True)
        say_warning(f"there is room again on the disk of {folder}: Redis starts")


def leave(notice: Path, text: str) -> None:
    """Write a notice for the group of the socket's folder to read."""
    new = notice.with_name(notice.name + ".new")
    new.unlink(missing_ok=True)
    number = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        os.fchmod(number, 0o640)  # whatever the umask is
        file.write(text + "\n")
    new.replace(notice)
