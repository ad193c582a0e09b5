# SPDX-License-Identifier: Apache-2.0
"""Real services for the tests: processes that never outlive a test, and private Redis servers."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import redis

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
#: How long a service may take to come up before the test gives up; the machine may be busy.
START_TIMEOUT_S = 120.0


def _die_with_parent() -> None:
    """Run in the child: the kernel kills it when pytest dies, even by SIGKILL."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ServiceError(AssertionError):
    """Raised when a service does not do what the test waits for; carries the end of its log."""


def whole_lines(text: str) -> list[str]:
    """Return the lines of a log that is still written to, without the one that has no end yet."""
    return text[: text.rfind("\n") + 1].splitlines()


class Process:
    """A command in a process group of its own, with its output in a file; always reaped.

    Use it as a context manager, or call ``kill()`` in the end.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self._env = None if env is None else dict(env)
        self._cwd = cwd
        self._pass_fds = pass_fds
        self._popen = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,
                pass_fds=self._pass_fds,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  one prctl; no lock is taken in the child
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit status; negative for a signal, None while it runs."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        return self.returncode is None

    def text(self) -> str:
        """Return what it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[str]:
        """Return the whole lines it has written so far: it may be writing the next one."""
        return whole_lines(self.text())

    def wait_for_line(self, pattern: str, timeout: float = START_TIMEOUT_S) -> str:
        """Wait until a line matches the pattern (searched); return that line.

        Raises ServiceError when the process ends, or the time is over, before that.
        """
        regex, until = re.compile(pattern), time.monotonic() + timeout
        while True:
            ended = not self.running
            for line in self.text().splitlines():
                if regex.search(line):
                    return line
            if ended or time.monotonic() > until:
                what = f"ended with {self.returncode}" if ended else f"was silent for {timeout:g} s"
                raise ServiceError(f"no line like {pattern!r}: {self.command[:4]} {what}\n{self.tail()}")
            time.sleep(0.02)

    def tail(self, lines: int = 40) -> str:
        """Return the end of its output, for a message."""
        return "\n".join(self.text().splitlines()[-lines:])

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone (not to its group); a process that is gone is left in peace."""
        self._popen.send_signal(number)

    def wait(self, timeout: float = START_TIMEOUT_S) -> int:
        """Wait for the end and return the exit status."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServiceError(f"{self.command[:4]} did not end in {timeout:g} s\n{self.tail()}") from None

    def terminate(self, timeout: float = START_TIMEOUT_S) -> int:
        """Ask it to end (SIGTERM) and wait; one that does not is killed, and the test fails."""
        self.send(signal.SIGTERM)
        try:
            return self.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> int:
        """Kill the process and its whole group, and reap it. Safe to call again."""
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)
        return self._popen.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def redis_binary() -> str | None:
    """Return the path of redis-server, or None."""
    return shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin")


def valkey_binary() -> str | None:
    """Return the path of the valkey-server that ``tests/get-valkey`` fetched, or None."""
    path = Path(__file__).resolve().parents[1] / ".cache" / "valkey" / "valkey-server"
    return str(path) if path.exists() else None


def wheel(name: str) -> Path | None:
    """Return the wheel that ``tests/get-wheels`` fetched of a project, or None."""
    folder = Path(__file__).resolve().parents[1] / ".cache" / "wheels"
    return next(folder.glob(f"{name.replace('-', '_')}-*.whl"), None)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody has just now, nor gets from the kernel in the meantime.

    By chance, below those that it hands out to whoever connects, or listens on port 0.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(min(10_000, first - 1000), first)  # noqa: S311
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1; return it (its own CA) and its key."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


class RedisServer:
    """A private redis-server on a Unix socket in a folder of its own: no port, nothing kept on disk.

    Options are redis.conf's with _ for -: ``RedisServer(maxmemory="8mb", appendonly="yes")``. With
    ``port`` or ``tls_port`` it listens on 127.0.0.1, too.
    """

    def __init__(self, binary: str | None = None, /, **options: str | int) -> None:
        binary = binary or redis_binary()
        if binary is None:
            raise ServiceError("there is no redis-server")
        # In /tmp and short: a socket's path may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="gi-redis-"))
        self.socket = self.folder / "redis.sock"
        conf: dict[str, str | int] = {
            "port": 0,
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "no",
            **options,
        }
        self._password = None if "requirepass" not in options else str(options["requirepass"])
        conf |= {"unixsocket": str(self.socket), "dir": str(self.folder), "daemonize": "no"}
        flags = [part for key, value in conf.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        self._command = [binary, *flags]
        self._process: Process | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """What goes into ``broker.url``."""
        return f"unix://{self.socket}?db=0"

    @property
    def process(self) -> Process:
        if self._process is None:
            raise ServiceError("redis-server was never started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self) -> redis.Redis:
        """Return a client whose answers are bytes."""
        return redis.Redis(unix_socket_path=str(self.socket), password=self._password)

    def start(self) -> None:
        """Start it (again), and wait until it answers."""
        self.socket.unlink(missing_ok=True)
        self._process = Process(self._command, self.folder / "redis.log")
        until = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if not self._process.running or time.monotonic() > until:
                raise ServiceError(f"redis-server does not answer\n{self._process.tail()}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    def stop(self) -> None:
        """End it in order; with ``appendonly`` on nothing is lost."""
        self.process.terminate()

    def kill(self) -> None:
        """Kill it on the spot."""
        self.process.kill()

    def close(self) -> None:
        """Kill it and remove its folder."""
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self.folder)
