# SPDX-License-Identifier: Apache-2.0
"""A booted Debian in a systemd-nspawn container, thrown away afterwards.

The root file system is shared and read-only; what a container writes lies in an overlay of its own.
Commands enter its namespaces (nsenter), since there is no D-Bus of the host to go through.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.host import cgroups
from tests.host.root import CACHE, HostError, run
from tests.services import Process

#: How long to wait before a test gives up; the machine may be busy. Units may take 90 s to stop.
BOOT_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 180.0
#: For a command in the container, and until one succeeds.
LIMIT_S = 300.0
UNTIL_TIMEOUT_S = 180.0
STATES = CACHE / "hosts"
#: Without these, DevicePolicy= and IPAddressDeny= are silently not enforced in the container.
_NSPAWN = ("--system-call-filter=bpf", "--capability=CAP_BPF", "--register=no", "--keep-unit", "--boot")


@dataclass(frozen=True)
class Answer:
    """What a command in the container gave."""

    code: int
    output: str

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.output}"


class Container:
    """One container: boot it by entering the context, or by ``boot()`` and ``close()``."""

    def __init__(
        self, lower: Path | str, name: str = "gpuhost", *, zone: str = "", state: Path | None = None
    ) -> None:
        self.name = name
        self._zone = zone
        self._owns_state = state is None
        self.state = state or new_state(name)
        self.folder = self.state / "root"
        self._lower = lower
        self._process: Process | None = None
        self._leader = 0

    # -- life -----------------------------------------------------------------------------

    def __enter__(self) -> Container:
        try:
            self.mount()
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def mount(self) -> None:
        """Lay the overlay over the shared root."""
        if run("stat", "-f", "-c", "%T", self.state).strip() == "overlayfs":
            # An overlay cannot be written to through another one (this machine is a container itself).
            run("mount", "-t", "tmpfs", "gpuinfer-test", self.state)
        for part in ("upper", "work", "root"):
            (self.state / part).mkdir(exist_ok=True)
        options = f"lowerdir={self._lower},upperdir={self.state}/upper,workdir={self.state}/work"
        run("mount", "-t", "overlay", "gpuinfer-test", "-o", options, self.folder)

    def boot(self, up: str = "systemctl is-system-running | grep -qE '^(running|degraded)$'") -> None:
        """Start systemd in it and wait until it has come up: until the script ``up`` succeeds in it."""
        zone = (f"--network-zone={self._zone}",) if self._zone else ("--private-network",)
        (self.folder / "etc/hostname").write_text(f"{self.name}\n")
        self._process = Process(
            [
                *cgroups.enter(self.state.name),
                "systemd-nspawn",
                "-q",
                "-D",
                self.folder,
                "-M",
                self.name,
                *_NSPAWN,
                *zone,
            ],
            self.state / "console.log",
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )
        self._leader = self._wait(self._find_leader, "a container", BOOT_TIMEOUT_S)
        self._wait(lambda: self.sh(up).code == 0, "the container's boot", BOOT_TIMEOUT_S)

    def _find_leader(self) -> int:
        """Return the pid of the container's systemd: nspawn's child that is process 1 in there."""
        if self._process is None or not self._process.running:
            raise HostError(f"systemd-nspawn ended:\n{(self.state / 'console.log').read_text()[-4000:]}")
        return next((pid for pid in _children(self._process.pid) if _is_init(pid)), 0)

    def poweroff(self) -> None:
        """Shut down in order, as an administrator's ``poweroff`` does."""
        if self._process is not None:
            os.kill(self._leader, signal.SIGRTMIN + 4)
            self._wait(lambda: self._process is None or not self._process.running, "poweroff", STOP_TIMEOUT_S)
            self._process.kill()
            self._process = None

    def reboot(self) -> None:
        """Shut down and come up again with what is on the disk."""
        self.poweroff()
        self.boot()

    def close(self) -> None:
        """End it at once, and leave nothing behind."""
        if self._process is not None:
            leader, self._leader = self._leader or self._find_leader_or_none(), 0
            with suppress(ProcessLookupError):
                if leader:
                    os.kill(leader, signal.SIGKILL)
            self._process.kill()
            self._process = None
        cgroups.remove(self.state.name)
        while os.path.ismount(self.folder):
            subprocess.run(["umount", "-R", str(self.folder)], check=False, capture_output=True)
            time.sleep(0.05)
        if self._owns_state:
            discard(self.state)

    def _find_leader_or_none(self) -> int:
        try:
            return self._find_leader()
        except HostError:
            return 0

    def _wait(self, ask: Callable[[], int], what: str, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = ask()
            if found:
                return found
            time.sleep(0.1)
        console = (self.state / "console.log").read_text(errors="replace")[-4000:]
        raise HostError(f"waited {timeout_s:g} s for {what}; the console:\n{console}")

    # -- the network ----------------------------------------------------------------------

    def join(self, address: str) -> None:
        """Give it an address (with its prefix length) on its zone's network."""
        run("ip", "link", "set", f"vz-{self._zone}", "up")
        self.link(up=True)
        self.ok(f"ip addr add {address} dev host0; ip link set host0 up")

    def link(self, *, up: bool) -> None:
        """Plug its network cable in, or pull it."""
        run("ip", "link", "set", f"vb-{self.name}", "up" if up else "down")

    # -- use ------------------------------------------------------------------------------

    def sh(self, script: str, *, timeout: float = LIMIT_S, env: Mapping[str, str] | None = None) -> Answer:
        """Run a shell script in the container as root; return its exit code, and both outputs as one."""
        names = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        names |= {"LANG": "C.UTF-8", "TERM": "dumb", "DEBIAN_FRONTEND": "noninteractive", **(env or {})}
        done = subprocess.run(
            ["nsenter", "-t", str(self._leader), "-a", "--wdns=/root", "bash", "-c", script],
            env=names,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            text=True,
            errors="replace",
            check=False,
            start_new_session=True,  # a script's `kill 0` must not reach us
        )
        return Answer(done.returncode, done.stdout)

    def ok(self, script: str, *, timeout: float = LIMIT_S, env: Mapping[str, str] | None = None) -> str:
        """Run a shell script that must succeed; return its output."""
        answer = self.sh(script, timeout=timeout, env=env)
        if answer.code:
            raise HostError(f"in {self.name}: {script}\n{answer}")
        return answer.output

    def until(self, script: str, *, timeout: float = UNTIL_TIMEOUT_S, what: str = "") -> str:
        """Run a shell script until it succeeds; return its output then."""
        deadline = time.monotonic() + timeout
        while True:
            answer = self.sh(script)
            if answer.code == 0:
                return answer.output
            if time.monotonic() > deadline:
                raise HostError(f"in {self.name}, waited {timeout:g} s for {what or script}:\n{answer}")
            time.sleep(0.2)

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in the container."""
        script = f"mkdir -p {shlex.quote(str(Path(path).parent))} && cat > {shlex.quote(path)}"
        subprocess.run(
            [
                "nsenter",
                "-t",
                str(self._leader),
                "-a",
                "--wdns=/",
                "bash",
                "-c",
                script + f" && chmod {mode:o} {path}",
            ],
            input=text,
            text=True,
            check=True,
        )

    def copy(self, source: Path, target: str) -> None:
        """Copy a file or folder of the machine into the container."""
        run("cp", "-a", "--no-preserve=ownership", source, f"{self.folder}{target}")


def new_state(name: str) -> Path:
    """Return a new folder for what a container writes, named after this process."""
    STATES.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-{name}-", dir=STATES))


def sweep() -> None:
    """Remove what test runs have left that were killed before they could."""
    for state in STATES.glob("*-*"):
        if not Path("/proc", state.name.partition("-")[0]).exists():
            discard(state)


def discard(state: Path) -> None:
    """Remove what a container wrote, and what still runs of it."""
    cgroups.remove(state.name)
    while os.path.ismount(state / "root"):
        run("umount", "-R", state / "root")
    if os.path.ismount(state):
        run("umount", state)
    shutil.rmtree(state, ignore_errors=True)


def _children(pid: int) -> list[int]:
    """Return a process's descendants; one that ends meanwhile is left out."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                for child in (task / "children").read_text().split():
                    found += [int(child), *_children(int(child))]
    return found


def _is_init(pid: int) -> bool:
    """Tell whether a process is number 1 of a pid namespace below ours."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
    return len(numbers) > 1 and numbers[-1] == "1" and "Name:\tsystemd" in status
