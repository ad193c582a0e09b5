# SPDX-License-Identifier: Apache-2.0
"""The three servers, each with its model on this machine's cores, as the kernel likes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol, Self

import httpx

from tests.bench.machine import cpu_seconds
from tests.services import Process, RedisServer, ServiceError, free_port
from tests.workers import Workers

_PEERS = Path(__file__).parent / "peers"
#: Seconds that a server has for its start.
_START_S = 90
#: What a peer needs beside its own package to take a form with a file.
_WITH = {"litserve": ("python-multipart",), "bentoml": ("pillow",)}


class Served(Protocol):
    """A server that runs. A context manager."""

    name: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def url(self, *, wait: bool) -> str | None:
        """Return where one input is posted; None where it cannot be done without waiting."""

    def body(self, value: list[float]) -> bytes:
        """Return the body for an input."""

    def front_s(self) -> float | None:
        """Return the processor time of what answers HTTP; None where that is not a process of its own."""


class Ours:
    """gpuinfer: Redis, one worker, and the front."""

    name = "gpuinfer"

    def __init__(self, folder: Path, processes: int = 1, model: str = "perceptron") -> None:
        self._redis = RedisServer()
        self._workers = Workers(self._redis, folder)
        self._workers.start(0, worker_models=model, traced=False)
        self._port = free_port()
        command = (sys.executable, "-m", "gpuinfer", "api", "--port", str(self._port))
        self._front = self._workers.spawn(*command, name="api", api_processes=processes)
        self._front.wait_for_line('"listening"')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._front.terminate()
        self._workers.close()
        self._redis.close()

    def url(self, *, wait: bool) -> str | None:
        return f"http://127.0.0.1:{self._port}/predict" + ("?wait=30" if wait else "")

    def body(self, value: list[float]) -> bytes:
        return str(value).replace(" ", "").encode()

    def front_s(self) -> float | None:
        return cpu_seconds(self._front.pid)


class Peer:
    """A program of ``peers/`` in the environment of its package, made by ``make_environment``."""

    def __init__(
        self,
        name: str,
        python: Path,
        folder: Path,
        model: str = "perceptron",
        first: tuple[bytes, str] | None = None,
    ) -> None:
        """``first``: the body of a request that tells whether it serves, and its content type."""
        self.name = name
        self._first = first or (self.body([0.0] * 64), "application/json")
        self._port = free_port()
        environment = os.environ | {
            "BENCH_MODEL": str(folder / "models" / model / "model.pt"),
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "BENCH_PORT": str(self._port),
        }
        arguments = ["--port", str(self._port), "--address", "127.0.0.1"] if name == "mosec" else []
        program = f"{name}_{'app' if model == 'perceptron' else model}.py"
        command = [str(python), program, *arguments]
        self._process = Process(command, folder / f"{name}.log", env=environment, cwd=_PEERS)
        until = time.monotonic() + _START_S
        while not self._answers():
            if not self._process.running or time.monotonic() > until:
                raise ServiceError(f"{name} does not start\n{self._process.tail()}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            body, content_type = self._first
            headers = {"content-type": content_type}
            return httpx.post(self.url(wait=True) or "", content=body, headers=headers, timeout=5).is_success
        except httpx.HTTPError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # with its group: LitServe's children outlive a parent that ends by SIGTERM

    def url(self, *, wait: bool) -> str | None:
        path = "/inference" if self.name == "mosec" else "/predict"
        return f"http://127.0.0.1:{self._port}{path}" if wait else None

    def body(self, value: list[float]) -> bytes:
        return b'{"input":%b}' % str(value).replace(" ", "").encode()

    def front_s(self) -> float | None:
        return None


def make_environment(name: str, folder: Path) -> Path:
    """Return the Python of an environment with a peer in it, made where it is missing.

    torch comes from this environment's packages, behind all that the peer brings.
    """
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", name, *_WITH.get(name, ())], check=True)
    (packages,) = (folder / name / "lib").glob("python3*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "torch_from.pth").write_text(ours + "\n")
    return python
