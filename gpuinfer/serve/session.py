# SPDX-License-Identifier: Apache-2.0
"""The processes of ``gpuinfer serve``: a private Redis, the API, and a worker that can be replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpuinfer.demo.private import GPUINFER, GRACE_S, START_TIMEOUT_S, Private, Report
from gpuinfer.demo.processes import Child, ProcessEnded, stop
from gpuinfer.demo.stack import API_READY, WORKER_READY, Plan

#: Seconds between two checks of logs and files.
CHECK_S = 0.2

#: Takes a process's name and an entry of its log, or a line of text.
Tell = Callable[[str, dict[str, Any] | str], None]


class Session(Private):
    """The processes for one model. ``tell`` gets the log entries of the worker and the API."""

    def __init__(self, folder: Path, devices: Plan, report: Report, tell: Tell) -> None:
        gpus = {"gpus": list(devices.gpus)} if devices.gpus else {}
        super().__init__(folder, {"worker": gpus}, report)
        ((self._number, device),) = devices.devices.items()
        self._own = {"GPUINFER_WORKER_DEVICE": "cpu"} if device == "CPU" else {}
        self._what = f"on {devices.summary}"
        self._tell = tell
        self._api: Child | None = None
        self._worker: Child | None = None
        self._ready = False

    def start(self, port: int, model: str) -> None:
        """Start everything, and wait until Redis and the API serve. Raises ConfigError, ProcessEnded."""
        until = time.monotonic() + START_TIMEOUT_S
        self._start_redis(until)
        self._api = self._spawn("api", [*GPUINFER, "api", "--host", "127.0.0.1", "--port", str(port)])
        self.start_worker(model)
        while not self._serves(self._api, API_READY):
            self._pause([self._api], until, "api")
        self._report("api", "", True)

    def start_worker(self, model: str) -> None:
        """Start a worker that serves ``model``. A running one is stopped first, after its batch."""
        if self._worker is not None:
            stop([self._worker], GRACE_S)
            self.poll()
            self._front.remove(self._worker)
            self._worker.log.unlink()
        own = {**self._own, "GPUINFER_WORKER_MODELS": model}
        self._worker = self._spawn("worker", [*GPUINFER, "worker", str(self._number)], own, self._what)
        self._ready = False

    def poll(self) -> bool:
        """Pass new log entries to ``tell``. Returns True once, when the worker has become ready.

        Raises ProcessEnded if the API or Redis has ended.
        """
        became_ready = False
        if self._worker is not None:
            for entry in self._worker.lines():
                if isinstance(entry, dict) and entry.get("action") == WORKER_READY and not self._ready:
                    self._ready = became_ready = True
                    self._report("worker", "", True)
                self._tell("worker", entry)
        if self._api is not None:
            for entry in self._api.lines():
                self._tell("api", entry)
        for child in (self._api, self._redis):
            if child is not None:
                child.check()
        return became_ready

    @property
    def worker_ended(self) -> int | None:
        """The exit code of a worker that has ended by itself; None while it runs."""
        return self._worker.exit_code if self._worker is not None else None

    def check_worker(self) -> None:
        """Raise ProcessEnded, with the worker's own exit code, if it has ended."""
        if self._worker is not None and self._worker.exit_code is not None:
            ended = ProcessEnded("the model is not served; see the error above", "worker")
            ended.exit_code = max(1, self._worker.exit_code)
            raise ended
