# SPDX-License-Identifier: Apache-2.0
"""Workers as plain processes, for a machine without systemd: the same contract.

Each child reports READY as it would to systemd, over a socket of its own. When the watcher dies, the kernel
sends its children SIGTERM: they drain and end, and the next watcher starts with none.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from gpuinfer.errors import UnitRefused, UnitStopping, UnitsUnavailable
from gpuinfer.watcher.state import UnitState, Verb
from gpuinfer.watcher.units import UnitView

_PR_SET_PDEATHSIG = 1
#: Exit statuses after which a worker is started again at once, as by its unit: it has grown past
#: worker.max_memory_mb, or a task ran past its hard time limit.
RESTARTED = (80, 81)
#: Seconds a worker may drain before it is killed.
STOP_TIMEOUT_S = 90.0
Command = Callable[[int], Sequence[str]]
#: Variables of one instance, in addition to those that all have.
Special = Callable[[int], Mapping[str, str]]


def worker_command(number: int) -> list[str]:
    """Return how worker ``number`` is started."""
    return [sys.executable, "-m", "gpuinfer", "worker", str(number)]


@dataclass
class _Child:
    process: asyncio.subprocess.Process
    ready_from: socket.socket
    waiter: asyncio.Task[None]


class ProcessUnits:
    """The worker processes of this watcher."""

    def __init__(
        self,
        command: Command = worker_command,
        environ: Mapping[str, str] | None = None,
        special: Special | None = None,
        clock: Callable[[], float] = time.monotonic,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        self._states: dict[int, tuple[UnitState, float]] = {}
        self._children: dict[int, _Child] = {}
        self._command = command
        self._environ = environ if environ is not None else os.environ
        self._special = special
        self._clock = clock
        self._stop_timeout_s = stop_timeout_s

    async def open(self) -> None:
        """Do nothing: there is nobody to connect to."""

    async def states(self, numbers: Collection[int]) -> Mapping[int, UnitView]:
        """Return the state of these instances, and of any other that is not inactive."""
        now = self._clock()
        known = {number: self._states.get(number, ("inactive", now)) for number in numbers}
        self._states = known | {n: state for n, state in self._states.items() if state[0] != "inactive"}
        return {n: UnitView(state=state, age_s=now - since) for n, (state, since) in self._states.items()}

    async def act(self, verb: Verb, number: int) -> None:
        """Start a process, or ask one to end."""
        state = self._states[number][0] if number in self._states else "inactive"
        if verb == "start" and state in ("inactive", "failed"):
            await self._start(number)
        elif verb == "start" and state == "deactivating":
            raise UnitStopping(f"worker {number} is being stopped", str(number))
        elif verb == "stop" and state in ("active", "activating"):
            self._enter(number, "deactivating")
            self._children[number].process.terminate()

    def _enter(self, number: int, state: UnitState) -> None:
        self._states[number] = (state, self._clock())

    async def _start(self, number: int) -> None:
        try:
            special = self._special(number) if self._special else {}
        except (ValueError, OSError) as exc:
            raise UnitRefused(f"worker {number} cannot be started: its own file: {exc}") from exc
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.setblocking(False)
        ready.bind("")  # the kernel picks an abstract name
        name = ready.getsockname().decode().replace("\0", "@", 1)
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command(number),
                stdin=asyncio.subprocess.DEVNULL,
                env={**self._environ, **special, "NOTIFY_SOCKET": name},
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        except OSError as exc:
            ready.close()
            self._enter(number, "failed")
            raise UnitsUnavailable(f"worker {number} cannot be started: {exc}") from exc
        self._enter(number, "activating")
        asyncio.get_running_loop().add_reader(ready, self._hear, number, ready)
        waiter = asyncio.create_task(self._wait(number, process), name=f"worker {number}")
        self._children[number] = _Child(process, ready, waiter)

    def _hear(self, number: int, ready: socket.socket) -> None:
        lines = ready.recv(4096).decode(errors="replace").split("\n")
        if "READY=1" in lines and self._states[number][0] == "activating":
            self._enter(number, "active")

    async def _wait(self, number: int, process: asyncio.subprocess.Process) -> None:
        """Wait for its end; send SIGKILL when it was asked to end and does not."""
        ending = asyncio.create_task(process.wait())
        while not ending.done():
            await asyncio.wait([ending], timeout=1.0)
            state, since = self._states[number]
            if state == "deactivating" and self._clock() - since > self._stop_timeout_s and not ending.done():
                process.kill()
        child = self._children.pop(number)
        asyncio.get_running_loop().remove_reader(child.ready_from)
        child.ready_from.close()
        wanted = self._states[number][0] == "deactivating"
        self._enter(number, "inactive" if wanted or process.returncode in (0, *RESTARTED) else "failed")
        if process.returncode in RESTARTED and not wanted:
            await self._start(number)

    async def close(self) -> None:
        """Ask all to end, and wait until they have."""
        for number in list(self._children):
            await self.act("stop", number)
        await asyncio.gather(*(child.waiter for child in list(self._children.values())))


def _die_with(parent: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
