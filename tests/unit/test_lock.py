# SPDX-License-Identifier: Apache-2.0
"""The lock that keeps one process to a worker's number, in a folder that is the worker's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from gpuinfer.errors import ConfigError, WorkerRunning
from gpuinfer.locks import LockState, acquire, domain, state, stopped

pytestmark = pytest.mark.unit

NAME = "gpu0@test"
#: Debian's nobody: anybody but root.
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``worker.run_dir``."""
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_one_holder(folder: Path) -> None:
    """Who comes second is told who came first; when the first lets go, the next may."""
    with acquire(folder, NAME), pytest.raises(WorkerRunning, match=f"as process {os.getpid()}"):
        acquire(folder, NAME)
    with stopped(folder, NAME), acquire(folder, "gpu1@test"):
        pass
    acquire(folder, NAME).close()
    assert (folder / f"{NAME}.lock").read_text(encoding="ascii") == f"{os.getpid()}\n"


@as_root
def test_root_keeps_nobody_out(folder: Path) -> None:
    """A lock that root makes in the worker's folder is the worker's, so that it can take it itself."""
    os.chown(folder, NOBODY, NOBODY)
    with stopped(folder, NAME):
        found = (folder / f"{NAME}.lock").stat()
        assert (found.st_uid, found.st_gid) == (NOBODY, NOBODY)
    os.chown(folder / f"{NAME}.lock", 0, 0)
    acquire(folder, NAME).close()  # one that was root's before
    assert (folder / f"{NAME}.lock").stat().st_uid == NOBODY


def seen_by(user: int, groups: list[int], folder: Path) -> LockState:
    """Return what a process of another user sees of the lock."""
    kinds: tuple[LockState, ...] = ("free", "held", "unknown")
    if (pid := os.fork()) == 0:
        found = 99
        try:
            os.setgroups(groups)
            os.setgid(user)
            os.setuid(user)
            found = kinds.index(state(folder, NAME))
        finally:
            os._exit(found)
    return kinds[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]


@as_root
def test_the_watcher_sees_who_runs() -> None:
    """It is another user, in the worker's group; the worker's umask hides its files. Nobody else may look."""
    worker, watcher = NOBODY, 65533
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.chown(folder, worker, worker)
        before = os.umask(0o077)
        try:
            lock = acquire(folder, NAME)
            domain(folder)
        finally:
            os.umask(before)
        with lock:
            assert seen_by(watcher, [worker], folder) == "held"
            assert seen_by(watcher, [], folder) == "unknown"
        assert seen_by(watcher, [worker], folder) == "free"
        assert (folder / "domain").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo"])
def test_nothing_but_a_file_of_its_own(folder: Path, tmp_path: Path, kind: str) -> None:
    """What a worker planted in its folder is refused: root would empty it, and give it away."""
    precious, lock = tmp_path / "precious", folder / f"{NAME}.lock"
    precious.write_text("keys", encoding="ascii")
    if kind == "symlink":
        lock.symlink_to(precious)
    elif kind == "hard link":
        lock.hardlink_to(precious)
    else:
        os.mkfifo(lock)
    owner = precious.stat().st_uid
    with pytest.raises(ConfigError, match=r"worker\.run_dir: cannot be written"):
        acquire(folder, NAME)
    assert precious.read_text(encoding="ascii") == "keys"
    assert precious.stat().st_uid == owner


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """The setting is named."""
    (tmp_path / "plain").touch()
    with pytest.raises(ConfigError, match=r"worker\.run_dir"):
        acquire(tmp_path / "plain" / "run", NAME)
