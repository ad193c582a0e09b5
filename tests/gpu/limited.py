# SPDX-License-Identifier: Apache-2.0
"""Run a command under a time limit, and leave nothing of it behind.

This process becomes the reaper of all that its commands start (PR_SET_CHILD_SUBREAPER), in whatever session
or process group: an orphan becomes our child, so that it is found and ended by its id.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)
#: Processes that get the kernel's signal when their parent ends may take this long to be gone.
_GRACE_S = 5.0
#: A process inside the driver may not end at all: after this time it is left, and named.
_KILL_WAIT_S = 10.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    seconds: float
    #: None: it ran past its limit.
    status: int | None
    #: Commands that it left running; they have been killed.
    left: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Return why that is no success; empty when it is one."""
        if self.status is None:
            return f"stopped at its limit, after {self.seconds:.0f} s"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        if self.status:
            return f"exit status {self.status}"
        return f"left running: {'; '.join(self.left)}" if self.left else ""


def become_reaper() -> None:
    """Make orphans of our commands our own children."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _dies_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return prepare


def run(
    command: Sequence[str | Path], log: BinaryIO, *, limit_s: float, env: Mapping[str, str], cwd: Path
) -> Ended:
    """Run a command with its output in ``log``; at the limit, and in any case, all of it is killed."""
    begun = time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509  one prctl; this process has one thread
    ) as process:
        status: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(limit_s)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_KILL_WAIT_S)
            left = end_children(0.0 if status is None else _GRACE_S)
            if process.returncode is None:  # inside the driver: ``with`` would wait for ever
                process.returncode = -signal.SIGKILL
    return Ended(time.monotonic() - begun, status, left if status is not None else ())


def end_children(grace_s: float = 0.0) -> tuple[str, ...]:
    """Wait a moment for all children to end, kill the others; return the commands that had to be killed."""
    left: dict[int, str] = {}
    begun = time.monotonic()
    while found := _children():
        waited = time.monotonic() - begun
        if waited > grace_s + _KILL_WAIT_S:
            break
        if waited >= grace_s:
            left |= found
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pid in found:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(_POLL_S)
    return tuple(left.values())


def _children() -> dict[int, str]:
    """Return our children, orphans included: process id -> command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):  # it may have ended since
            fields = (
                (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            )
            if int(fields[1]) == os.getpid():
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = words.strip()[:120] or "a process that has ended"
    return found
