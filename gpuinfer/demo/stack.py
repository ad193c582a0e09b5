# SPDX-License-Identifier: Apache-2.0
"""The private appliance: Redis, workers and API in a temporary folder, started and ended in order.

    redis ─► api, workers, and the model called directly (side by side) ─► ... ─► api, workers ─► redis

Nothing of the host is read or changed: no settings file, no GPUINFER_* variable, no TCP port but the
API's, which the kernel picks.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import redis

from gpuinfer.demo.processes import Child, ProcessEnded, stop
from gpuinfer.errors import ConfigError
from gpuinfer.gpus import VISIBLE, Inventory, check_visible, list_gpus, visible

#: How long everything together may take to come up; a cold disk makes importing torch slow.
START_TIMEOUT_S = 180.0
#: How long API and workers may take to end by themselves; Redis, which keeps nothing here, needs less.
GRACE_S, REDIS_GRACE_S = 10.0, 2.0
_POLL_S = 0.03
#: The process that calls the model directly.
_DIRECT = "model"
#: Files in the folder.
CONFIG, SOCKET = "gpuinfer.toml", "redis.sock"
#: A socket's path may have 107 bytes; the folder's own name and the file's take up to 40.
LONGEST_PARENT = 107 - 40
#: Variables that would lead a child to somebody else's settings, broker, supervisor or credentials.
_FOREIGN_PREFIXES = ("GPUINFER_", "CELERY_")
_FOREIGN = frozenset({"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", VISIBLE})
#: The action of the log line that says a process serves.
_WORKER_READY, _API_READY = "worker_ready", "listening"

#: Called when a part begins to start (False) and when it is ready (True).
Report = Callable[[str, str, bool], None]


@dataclass(frozen=True)
class Plan:
    """What the workers run on."""

    #: Worker number -> what it is called to people; "CPU" for one without a GPU.
    devices: Mapping[int, str]
    #: Names of GPUs for ``worker.gpus`` where the caller restricts them.
    gpus: tuple[str, ...] = ()
    #: Why a GPU that is there is not used; empty when there is nothing to say.
    note: str = ""

    @property
    def summary(self) -> str:
        """What the workers run on, in words: ``GPU 0 (H200) and the CPU``."""
        names = list(dict.fromkeys(self.devices.values()))
        return " and ".join(("the CPU" if name == "CPU" else name) for name in names)


def plan(
    workers: int,
    environ: Mapping[str, str],
    list_gpus: Callable[[Sequence[str]], Inventory] = list_gpus,
) -> Plan:
    """Give each worker a GPU while there are any, the CPU after that. Honours CUDA_VISIBLE_DEVICES.

    Raises DeviceError where that names no device.
    """
    found, names = list_gpus(()), visible(environ)
    if not found.gpus:
        note = f"the GPU cannot be used: {found.reason}" if found.failed else ""
        return Plan(dict.fromkeys(range(workers), "CPU"), note=note)
    if names == ():
        return Plan(dict.fromkeys(range(workers), "CPU"), note=f"{VISIBLE}={environ[VISIBLE]} hides the GPUs")
    check_visible(environ, inventory=found)
    if names:
        found = list_gpus(names)
    devices = {number: _device_name(found, number) for number in found.worker_numbers[:workers]}
    free = (number for number in itertools.count() if number not in devices)
    devices |= dict.fromkeys(itertools.islice(free, workers - len(devices)), "CPU")
    return Plan(devices, names or ())


def _device_name(found: Inventory, number: int) -> str:
    gpu = found.of_worker(number)
    return f"GPU {gpu.index} ({gpu.name})" if gpu and gpu.name else f"GPU {number}"


class Stack:
    """The processes of a demo and their folder. ``started`` makes one and ends it."""

    def __init__(self, folder: Path, devices: Plan, report: Report) -> None:
        self.folder = folder
        self.plan = devices
        #: Where the API is: ``http://127.0.0.1:PORT``.
        self.url = ""
        #: Results of the model called directly, in the images' order.
        self.direct: list[dict[str, Any]] = []
        self.workers: list[Child] = []
        self._report = report
        self._front: list[Child] = []
        self._redis: Child | None = None
        self._environment = _environment(folder)
        (folder / CONFIG).write_text(_config(folder, devices), encoding="utf-8")

    def start(self) -> None:
        """Start everything and wait until all of it serves. Raises ConfigError, ProcessEnded."""
        until = time.monotonic() + START_TIMEOUT_S
        self._start_redis(until)
        api = self._spawn("api", [*_GPUINFER, "api", "--host", "127.0.0.1", "--port", "0"])
        for number, device in self.plan.devices.items():
            name = f"worker {number}"
            own = {} if device != "CPU" else {"GPUINFER_WORKER_DEVICE": "cpu", "GPUINFER_WORKER_THREADS": "1"}
            self.workers.append(self._spawn(name, [*_GPUINFER, "worker", str(number)], own, f"on {device}"))
        target = self.folder / "direct.json"
        direct = self._spawn(
            _DIRECT, [sys.executable, "-m", "gpuinfer.demo.direct", str(target)], what="called directly"
        )
        ready = {api: _API_READY, **dict.fromkeys(self.workers, _WORKER_READY)}
        self._await_all(ready, direct, target, until)

    def check(self) -> None:
        """Raises ProcessEnded when a process does not run any more."""
        for child in [*self._front, *([self._redis] if self._redis else [])]:
            child.check()

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield the workers' ``batch_done`` log lines that have not been yielded before, one a batch."""
        for worker in self.workers:
            found = (entry for entry in worker.news() if entry.get("action") == "batch_done")
            yield from (entry for entry in found if entry.get("part", "1 ").startswith("1 "))

    def close(self) -> None:
        """End all processes: the workers while Redis is still there to take back what they hold."""
        stop(self._front, GRACE_S)
        if self._redis is not None:
            stop([self._redis], REDIS_GRACE_S)

    # -- starting -------------------------------------------------------------------------

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
        options |= {"save": "", "appendonly": "no", "daemonize": "no"}
        command = [_redis_binary(), *(str(part) for key, v in options.items() for part in (f"--{key}", v))]
        self._redis = Child("redis", command, self.folder / "redis.log", self._environment)
        self._report("redis", "on a Unix socket", False)
        with redis.Redis(unix_socket_path=str(socket)) as client:
            while not _answers(client):
                self._pause([self._redis], until, "redis")
        self._report("redis", "", True)

    def _await_all(self, ready: dict[Child, str], direct: Child, target: Path, until: float) -> None:
        """Wait for each log line in ``ready``, and for the file of the model called directly."""
        while ready or not self.direct:
            for child in [child for child, action in ready.items() if self._serves(child, action)]:
                del ready[child]
                self._report(child.name, "", True)
            if not self.direct and target.exists():
                self.direct = orjson.loads(target.read_bytes())
                self._front.remove(direct)
                stop([direct], GRACE_S)
                self._report(direct.name, "", True)
            if ready or not self.direct:
                self._pause(self._front, until, ", ".join(child.name for child in ready) or direct.name)

    def _serves(self, child: Child, action: str) -> bool:
        for entry in child.news():
            if entry.get("action") == action:
                self.url = str(entry.get("address", self.url))
                return True
        return False

    def _pause(self, children: list[Child], until: float, waiting: str) -> None:
        """Wait a moment. Raises ProcessEnded when a child has failed, or the time is over."""
        for child in children:
            if child.name != _DIRECT or child.exit_code:  # that one ends by itself, with 0
                child.check()
        if time.monotonic() > until:
            raise ProcessEnded(f"not ready after {START_TIMEOUT_S:g} s: {waiting}; its log says more")
        time.sleep(_POLL_S)

    def failed(self) -> Child | None:
        """Return the process that has ended by itself, if one has; its log says why."""
        children = [*self._front, *([self._redis] if self._redis else [])]
        return next((child for child in children if child.exit_code is not None), None)


_GPUINFER = (sys.executable, "-m", "gpuinfer")


@contextmanager
def started(devices: Plan, report: Report) -> Iterator[Stack]:
    """Yield a stack that has not started yet; in the end its processes and its folder are gone.

    Signals that would end this process are ignored meanwhile: the end takes some seconds at most.
    """
    folder = _folder()
    stack = Stack(folder, devices, report)
    try:
        yield stack
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        stack.close()
        shutil.rmtree(folder)


def _folder() -> Path:
    """Make the temporary folder, mode 0700; in /tmp where $TMPDIR is too long for a socket's path."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > LONGEST_PARENT:
        parent = "/tmp"  # noqa: S108  mkdtemp makes a folder of its own in it
    return Path(tempfile.mkdtemp(prefix="gpuinfer-demo-", dir=parent))


def _environment(folder: Path) -> dict[str, str]:
    """Return what the children see: the caller's variables without the foreign ones, and ours."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    return kept | {"GPUINFER_CONFIG": str(folder / CONFIG), "GPUINFER_LOG_FORMAT": "json"}


def _config(folder: Path, devices: Plan) -> str:
    """Return the settings file: everything in the folder. JSON's strings and lists are TOML's, too."""
    gpus = f"gpus = {json.dumps(devices.gpus)}\n" if devices.gpus else ""
    return (
        f"[broker]\nurl = {json.dumps(f'unix://{folder / SOCKET}?db=0')}\n\n"
        f"[models]\nfolders = {json.dumps([str(folder / 'models')])}\n\n"
        f"[worker]\nrun_dir = {json.dumps(str(folder))}\n{gpus}"
    )


def _redis_binary() -> str:
    """Find redis-server; a user's PATH may lack the sbin folders. Raises ConfigError."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = shutil.which("redis-server", path=path)
    if found is None:
        raise ConfigError("there is no redis-server; install it with: apt install redis-server")
    return found


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False
