# SPDX-License-Identifier: Apache-2.0
"""Real worker processes for the tests."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.services import Process, RedisServer

#: The node name of worker 0 here.
NAME = f"gpu0@{socket.gethostname()}"


#: What to put before a command to keep coverage out of it.
UNTRACED = ("env", "-u", "COVERAGE_PROCESS_CONFIG", "-u", "COVERAGE_PROCESS_START")


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Wait until the condition holds; an assertion fails when it does not in time."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not become so in time"
        time.sleep(0.01)


class Workers:
    """Starts ``gpuinfer worker N`` processes on one Redis; all are killed in the end.

    Models come from ``folder/models``; keyword arguments are settings, ``worker_models="slow"``.
    """

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        self.redis = redis
        self.folder = folder
        self._started: list[Process] = []

    def environment(self, **settings: object) -> dict[str, str]:
        """Return the environment of a gpuinfer command for this Redis."""
        chosen = {
            "broker_url": self.redis.url,
            "worker_run_dir": self.folder / "run",
            "worker_threads": 1,
            "models_folders": self.folder / "models",
            "log_format": "json",
            **settings,
        }
        credentials = {
            key.upper(): str(chosen.pop(key)) for key in ["credentials_directory"] if key in chosen
        }
        variables = {f"GPUINFER_{key.upper()}": str(value) for key, value in chosen.items()}
        return os.environ | variables | credentials

    def spawn(self, *command: str, name: str, **settings: object) -> Process:
        """Start any command; its output goes to ``folder/NAME.log``."""
        process = Process(command, self.folder / f"{name}.log", env=self.environment(**settings))
        self._started.append(process)
        return process

    def start(
        self, number: int = 0, *, ready: bool = True, traced: bool = True, **settings: object
    ) -> Process:
        """Start worker ``number`` and wait until it serves.

        ``traced=False`` keeps coverage out of it: while an interrupt is on its way to a thread in native
        code, CPython 3.11 stalls every other thread that is traced (and only those).
        """
        log = self.folder / f"worker{number}.log"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "gpuinfer", "worker", str(number)]
        if not traced:
            command = [*UNTRACED, *command]
        process = self.spawn(*command, name=log.stem, **settings)
        if ready:
            process.wait_for_line('"worker_ready"')
        return process

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._started:
            process.kill()
