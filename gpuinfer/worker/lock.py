# SPDX-License-Identifier: Apache-2.0
"""One process to a worker number on a host: a file lock that the kernel lets go when its owner dies."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gpuinfer.errors import ConfigError, WorkerRunning


def acquire(run_dir: Path, worker: str) -> IO[str]:
    """Take the lock of ``worker`` (``gpu0@host``) and return its open file; closing it lets go.

    Raises WorkerRunning when another process holds it, ConfigError when the folder cannot be used.
    """
    path = run_dir / f"{worker}.lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = _open(path)
        if os.geteuid() == 0:  # an administrator's restore must not keep the worker's own user out
            owner_of = run_dir.stat()
            os.fchown(file.fileno(), owner_of.st_uid, owner_of.st_gid)
    except OSError as exc:
        raise ConfigError(f"cannot be written: {exc}", "worker.run_dir") from exc
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise WorkerRunning(f"{worker} runs already, as process {owner}") from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _open(path: Path) -> IO[str]:
    """Open a lock file, made where it is missing.

    Not through a link: the folder is the worker's, whose model is a program, and we may be root.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(number)
        raise OSError(f"{path} is no plain file of its own")
    return os.fdopen(number, "r+", encoding="ascii")


@contextmanager
def stopped(run_dir: Path, worker: str) -> Iterator[None]:
    """Hold the lock of a worker that does not run, so that it cannot start meanwhile."""
    file = acquire(run_dir, worker)
    try:
        yield
    finally:
        file.close()
