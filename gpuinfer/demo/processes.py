# SPDX-License-Identifier: Apache-2.0
"""Child processes that do not outlive their parent, and their logs."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from gpuinfer.errors import GpuinferError

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.02


class ProcessEnded(GpuinferError, code="process_ended", exit_code=1):
    """Raised when a process of a private appliance ends, or does not become ready."""


def _die_with(parent: int) -> Callable[[], None]:
    """Return a preexec_fn that has the kernel kill the child when ``parent`` dies."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return prepare


class Child:
    """A running process with its output in a file. Create it in the main thread.

    The kernel kills the child when the *thread* that started it ends. The child has its own session, so
    that Ctrl-C in the terminal reaches only the parent, which stops its children in order.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._seen = 0
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  started before any threads
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._popen.poll()

    def news(self) -> Iterator[dict[str, Any]]:
        """Yield the JSON lines written since the last call; skip other lines."""
        yield from (line for line in self.lines() if isinstance(line, dict))

    def lines(self) -> Iterator[dict[str, Any] | str]:
        """Yield the lines written since the last call: JSON objects parsed, others as text."""
        with self.log.open("rb") as file:
            file.seek(self._seen)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._seen += len(line)
                entry = _parsed(line)
                yield line.decode(errors="replace").rstrip("\n") if entry is None else entry

    def tail(self, lines: int = 15) -> list[str]:
        """Return the last lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]

    def check(self) -> None:
        """Raises ProcessEnded if it has ended."""
        if self.exit_code is not None:
            raise ProcessEnded(f"{self.name} {_how(self.exit_code, self.tail())}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        self._popen.send_signal(number)


def stop(children: Sequence[Child], grace_s: float) -> None:
    """Stop processes together: SIGTERM, then SIGKILL after ``grace_s``. Reaps them."""
    for child in children:
        child.signal(signal.SIGTERM)
    until = time.monotonic() + grace_s
    while any(child.exit_code is None for child in children) and time.monotonic() < until:
        time.sleep(_POLL_S)
    for child in children:
        child.signal(signal.SIGKILL)
    while any(child.exit_code is None for child in children):
        time.sleep(_POLL_S)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) else None


def _how(status: int, tail: Sequence[str]) -> str:
    """Say how a process ended, with the last line of its log unless it was killed."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit code {status}{_reason(tail)}"


def _reason(tail: Sequence[str]) -> str:
    entry = _parsed(tail[-1].encode()) if tail else None
    if entry is None:
        return f": {tail[-1].strip()}" if tail else "; it wrote no log"
    return ": " + " ".join(str(entry[key]) for key in ("action", "message", "reason") if key in entry)
