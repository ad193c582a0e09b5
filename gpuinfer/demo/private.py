# SPDX-License-Identifier: Apache-2.0
"""A private appliance: its own Redis and other processes in a temporary folder, started and stopped in order.

It uses nothing of the host: no settings file, no GPUINFER_* variable, no TCP port except the API's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import redis

from gpuinfer.demo.processes import Child, ProcessEnded, stop
from gpuinfer.errors import ConfigError
from gpuinfer.gpu_binding import VISIBLE

#: Maximum seconds until everything is ready; importing torch from a cold disk is slow.
START_TIMEOUT_S = 180.0
#: Seconds before SIGKILL when stopping API and workers, and when stopping Redis, which saves nothing here.
GRACE_S, REDIS_GRACE_S = 10.0, 2.0
_POLL_S = 0.03
#: Files in the folder.
CONFIG, SOCKET = "gpuinfer.toml", "redis.sock"
#: A socket path may have 107 bytes; the names of the folder and the socket take up to 40.
LONGEST_PARENT = 107 - 40
#: Variables removed for children: they name other settings, brokers, supervisors or credentials.
_FOREIGN_PREFIXES = ("GPUINFER_", "CELERY_")
_FOREIGN = frozenset({"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", VISIBLE})
#: Runs this program in a child process.
GPUINFER = (sys.executable, "-m", "gpuinfer")

#: Called with False when a service begins to start, and with True when it is ready.
Report = Callable[[str, str, bool], None]


class Private:
    """The processes and the folder of a private appliance."""

    #: Options of its Redis, which saves nothing.
    redis_options: Mapping[str, str] = {"save": "", "appendonly": "no", "daemonize": "no"}

    def __init__(self, folder: Path, settings: Mapping[str, Mapping[str, object]], report: Report) -> None:
        self.folder = folder
        #: URL of the API: ``http://127.0.0.1:PORT``.
        self.url = ""
        self._report = report
        self._front: list[Child] = []
        self._redis: Child | None = None
        self._environment = _environment(folder)
        (folder / CONFIG).write_text(_config(folder, settings), encoding="utf-8")

    def check(self) -> None:
        """Raises ProcessEnded if a process has ended."""
        for child in [*self._front, *([self._redis] if self._redis else [])]:
            child.check()

    def failed(self) -> Child | None:
        """Return a process that has ended unexpectedly, if any; its log says why."""
        children = [*self._front, *([self._redis] if self._redis else [])]
        return next((child for child in children if child.exit_code is not None), None)

    def close(self) -> None:
        """Stop all processes; Redis last, so that workers can return their tasks."""
        stop(self._front, GRACE_S)
        if self._redis is not None:
            stop([self._redis], REDIS_GRACE_S)

    # -- for subclasses -------------------------------------------------------------------

    def _spawn(
        self, name: str, command: list[str], own: Mapping[str, str] | None = None, what: str = ""
    ) -> Child:
        log = self.folder / f"{name.replace(' ', '-')}.log"
        child = Child(name, command, log, self._environment | dict(own or {}))
        self._front.append(child)
        self._report(name, what, False)
        return child

    def _start_redis(self, until: float) -> None:
        socket = self.folder / SOCKET
        options = {"port": 0, "unixsocket": socket, "unixsocketperm": 700, "dir": self.folder}
        options |= self.redis_options
        command = [_redis_binary(), *(str(part) for key, v in options.items() for part in (f"--{key}", v))]
        self._redis = Child("redis", command, self.folder / "redis.log", self._environment)
        self._report("redis", "on a Unix socket", False)
        with redis.Redis(unix_socket_path=str(socket)) as client:
            while not _answers(client):
                self._pause([self._redis], until, "redis")
        self._report("redis", "", True)

    def _serves(self, child: Child, action: str) -> bool:
        """Whether a child has logged that it is ready."""
        for entry in child.news():
            if entry.get("action") == action:
                self.url = str(entry.get("address", self.url))
                return True
        return False

    def _pause(self, children: list[Child], until: float, waiting: str) -> None:
        """Wait a moment. Raises ProcessEnded if a child has ended, or at the time ``until``."""
        for child in children:
            if not self._may_end(child):
                child.check()
        if time.monotonic() > until:
            raise ProcessEnded(f"not ready after {START_TIMEOUT_S:g} s: {waiting}; see its log")
        time.sleep(_POLL_S)

    def _may_end(self, child: Child) -> bool:
        """Whether this child may end, with its exit code."""
        return False


@contextmanager
def cleaning_up(private: Private) -> Iterator[None]:
    """Stop the processes and delete the folder at the end of the block.

    Signals that would end this process are ignored during the cleanup, which takes some seconds at most.
    """
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        private.close()
        shutil.rmtree(private.folder)


def end_in_order() -> None:
    """Clean up on SIGTERM and SIGHUP, as on Ctrl-C; an ignored signal (nohup) stays ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _: object) -> NoReturn:
    """Exit with the signal's exit code, through all ``finally`` blocks."""
    raise SystemExit(128 + number)


def private_folder(prefix: str) -> Path:
    """Create the temporary folder, mode 0700; in /tmp if $TMPDIR is too long for a socket path."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > LONGEST_PARENT:
        parent = "/tmp"  # noqa: S108  mkdtemp creates a private folder in it
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of the children: the caller's without ``_FOREIGN``, and the private one's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    return kept | {"GPUINFER_CONFIG": str(folder / CONFIG), "GPUINFER_LOG_FORMAT": "json"}


def _config(folder: Path, settings: Mapping[str, Mapping[str, object]]) -> str:
    """Return the text of the settings file. Strings and lists are the same in JSON and TOML."""
    own: dict[str, dict[str, object]] = {
        "broker": {"url": f"unix://{folder / SOCKET}?db=0"},
        "models": {"folders": [str(folder / "models")]},
        "api": {"keys_dir": str(folder / "keys.d")},
        "worker": {"run_dir": str(folder)},
    }
    for section, keys in settings.items():
        own.setdefault(section, {}).update(keys)
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in own.items()
    )


def _redis_binary() -> str:
    """Return the path of redis-server; a user's PATH may lack the sbin folders. Raises ConfigError."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = shutil.which("redis-server", path=path)
    if found is None:
        raise ConfigError("redis-server is not installed; install it with: apt install redis-server")
    return found


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False
