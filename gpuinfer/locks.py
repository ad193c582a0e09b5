# SPDX-License-Identifier: Apache-2.0
"""One process to a worker number on a host: a file lock that the kernel lets go when its owner dies."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from gpuinfer.errors import ConfigError, WorkerRunning

LockState = Literal["free", "held", "unknown"]

#: Of a lock, whatever the umask is. The worker's group, which the watcher is in, may look at it; nobody else:
#: who can open it can take it, and keep the worker from starting.
_LOCK_MODE = 0o640


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
        _take(file)
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


def domain(run_dir: Path) -> str:
    """Return what tells this folder of locks from another host's, or another container's.

    Raises ConfigError when the folder cannot be used.
    """
    path = run_dir / "domain"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            own = path.with_name(f".domain.{secrets.token_hex(4)}")
            _write_new(own, secrets.token_hex(8), run_dir.stat())
            try:
                os.link(own, path)  # whole, or not at all
            finally:
                own.unlink()
        with open(path, encoding="ascii", opener=_no_link) as file:
            return file.read(64).strip()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot be written: {exc}", "worker.run_dir") from exc


def known_domain(run_dir: Path) -> str:
    """Return the same without making it; empty where there is none yet, or this user may not read it."""
    try:
        with open(run_dir / "domain", encoding="ascii", opener=_no_link) as file:
            return file.read(64).strip()
    except (OSError, ValueError):
        return ""


def state(run_dir: Path, worker: str) -> LockState:
    """Tell whether a process holds the lock of ``worker``; ``unknown`` where this user may not look.

    Leaves no trace. A lock that is free is held for a moment.
    """
    try:
        number = os.open(
            run_dir / f"{worker}.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        )
    except FileNotFoundError:
        return "free"
    except OSError:
        return "unknown"
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    finally:
        os.close(number)
    return "free"


def _take(file: IO[str]) -> None:
    """Lock a file. Somebody may look at it just now (``state``): that is over at once."""
    for pause_s in (0.01, 0.05, 0.2):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(pause_s)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_new(path: Path, text: str, folder: os.stat_result) -> None:
    """Write a file that is not there yet, and that everybody can read, whatever the umask is."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(number, "w", encoding="ascii") as file:
        os.fchmod(number, 0o644)
        file.write(text)
        if os.geteuid() == 0:
            os.fchown(number, folder.st_uid, folder.st_gid)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _open(path: Path) -> IO[str]:
    """Open a lock file, made where it is missing.

    Not through a link: the folder is the worker's, whose model is a program, and we may be root.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(number)
        raise OSError(f"{path} is no plain file of its own")
    if stat.S_IMODE(found.st_mode) != _LOCK_MODE:
        os.fchmod(number, _LOCK_MODE)
    return os.fdopen(number, "r+", encoding="ascii")


@contextmanager
def stopped(run_dir: Path, worker: str) -> Iterator[None]:
    """Hold the lock of a worker that does not run, so that it cannot start meanwhile."""
    file = acquire(run_dir, worker)
    try:
        yield
    finally:
        file.close()
