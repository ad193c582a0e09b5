# SPDX-License-Identifier: Apache-2.0
"""The real API as a process, and the end of tasks as a worker writes it, for tests without a worker."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import orjson
import redis

from gpuinfer.api import schemas
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Claimed, Final, label
from gpuinfer.queue.keys import place_of
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, QueueSettings
from tests.conftest import need
from tests.services import Process, RedisServer

WORKER = "gpu0@test"
#: pidfd_getfd(2), which glibc has no function for everywhere; its number is the same on all architectures.
_PIDFD_GETFD = 438
_LIBC = ctypes.CDLL(None, use_errno=True)


class HandWorker:
    """Claims, begins and settles over a Store, as a worker does, one step at a time.

    Its first claim enters its models into the catalogue, and makes the first one the default.
    """

    def __init__(self, client: redis.Redis, *models: str, name: str = WORKER) -> None:
        models = models or ("digits",)
        self.store = Store(client, name, QUEUES, QueueSettings(), models=models)

    def register(self) -> None:
        """Say what it serves, as a worker that has stopped since: known, and not alive."""
        self.store.register(default=self.store.models[0])

    def beat(self, **more: Any) -> None:
        """Say what it serves, and that it lives: for an hour, however long the machine stands still."""
        body = {"worker": WORKER, "models": self.store.models, "queues": self.store.queues, **more}
        self.store.register(orjson.dumps(body), default=self.store.models[0])
        key = keys.heartbeat(self.store.worker)
        told: Any = self.store.client.get(key)
        written = orjson.loads(told)
        self.store.client.set(key, orjson.dumps(written | {"at": written["at"] + 3600}))

    def claim(self, room: int = 1) -> list[Claimed]:
        """Take tasks, also those of plain producers."""
        self.register()
        return self.store.claim(room, search=True)

    def begin(self, task: Claimed) -> str:
        """Mark a claimed task as running; return its id."""
        task_id = decode(task.payload).id
        self.store.begin(
            [(task.seq, task_id, results.started(task_id, WORKER, os.getpid(), caller=_whose(task)))]
        )
        return task_id

    def finish(self, task: Claimed, result: Any) -> None:
        """Write a claimed task's result, or its error."""
        envelope = decode(task.payload)
        make: Callable[..., bytes] = results.failure if isinstance(result, Exception) else results.success
        meta = make(envelope.id, result, worker=WORKER, caller=_whose(task))
        named = label("failed" if isinstance(result, Exception) else "completed", "realtime", task.model)
        self.store.settle([Final(task.seq, envelope.id, meta, reply=envelope.reply_to, label=named)])

    def finish_all(self, result: Any, room: int = 1000) -> int:
        """Claim, begin and finish all there is up to ``room``; return how many."""
        tasks = self.claim(room)
        for task in tasks:
            self.begin(task)
            self.finish(task, result)
        return len(tasks)


def _whose(task: Claimed) -> str:
    return place_of(task.list_key).caller


#: Runs gpuinfer on a host of another name.
_ELSEWHERE = """
import runpy, socket, sys
host = sys.argv.pop(1)
socket.gethostname = socket.getfqdn = lambda *_: host
runpy.run_module("gpuinfer", run_name="__main__", alter_sys=True)
"""


class Api:
    """``gpuinfer api`` on a free port, with an HTTP client for it. Use it as a context manager."""

    def __init__(
        self,
        server: RedisServer,
        folder: Path,
        *arguments: str,
        verify: Any = True,  # as httpx takes it
        host: object = "",
        **settings: object,
    ) -> None:
        """``host``: what its host is called, if not as this one."""
        chosen = {"broker_url": server.url, "log_format": "json", **settings}
        environment = os.environ | {f"GPUINFER_{key.upper()}": str(value) for key, value in chosen.items()}
        program = ["-c", _ELSEWHERE, str(host)] if host else ["-m", "gpuinfer"]
        command = [sys.executable, *program, "api", *(arguments or ("--port", "0"))]
        self.process = Process(command, folder / "api.log", env=environment)
        self.address: str = json.loads(self.process.wait_for_line('"listening"'))["address"]
        unix = self.address.startswith("unix:")
        transport = httpx.HTTPTransport(uds=self.address.removeprefix("unix:")) if unix else None
        self.http = httpx.Client(
            base_url="http://api" if unix else self.address, transport=transport, timeout=60, verify=verify
        )

    def log(self, action: str) -> list[dict[str, Any]]:
        """Return the lines of that action."""
        lines = [json.loads(line) for line in self.process.lines() if line.startswith("{")]
        return [line for line in lines if line["action"] == action]

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.process.kill()


def submit(api: Api, inputs: object = schemas.DIGIT) -> str:
    """Submit a digit and return its id."""
    response = api.http.post("/predict", json=inputs)
    assert response.status_code == 202, response.text
    return str(response.json()["task_id"])


def delays(pid: int, port: int) -> list[bool]:
    """Tell of each connection that a process has accepted at a port whether TCP may delay what it writes."""
    found, process = [], os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            copy = int(_LIBC.syscall(_PIDFD_GETFD, process, int(entry.name), 0))
            need(copy >= 0 or ctypes.get_errno() == errno.EBADF, "pidfd_getfd of a child")
            if copy < 0:  # closed meanwhile
                continue
            if not stat.S_ISSOCK(os.fstat(copy).st_mode):
                os.close(copy)
                continue
            with socket.socket(fileno=copy) as one:
                listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if one.family == socket.AF_INET and one.getsockname()[1] == port and not listens:
                    found.append(not one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    finally:
        os.close(process)
    return found
