# SPDX-License-Identifier: Apache-2.0
"""The load: each image as one request, several times over, while batch jobs submit all images at once.

HTTP over keep-alive connections, one thread each: POST, then GET /result?wait= until the task has ended. A
closed loop: a connection sends its next request after it has its answer.
"""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

Tier = Literal["realtime", "batch"]
TIERS: tuple[Tier, ...] = ("realtime", "batch")
#: Seconds: the wait of one GET for a result, the maximum per request, and the socket timeout.
WAIT_S, DEADLINE_S, SOCKET_TIMEOUT_S = 20.0, 120.0, 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The outcome of one request: its results, one per image, or its error."""

    tier: Tier
    #: Indices of its images in the test set.
    images: Sequence[int]
    #: Monotonic times before the POST and after the result.
    begun: float
    ended: float
    results: Sequence[dict[str, Any]] = ()
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


class Refused(Exception):
    """Raised if the API answers with an error or a task fails; the message says which."""


class Connection:
    """One keep-alive connection to the API."""

    def __init__(self, url: str) -> None:
        host = urlsplit(url).netloc
        self._http = http.client.HTTPConnection(host, timeout=SOCKET_TIMEOUT_S)

    def close(self) -> None:
        self._http.close()

    def infer(self, path: str, body: bytes) -> Any:
        """Submit, wait, and return the task's result. Raises Refused, OSError, HTTPException."""
        task_id = self._call("POST", path, body)["task_id"]
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            status = self._call("GET", f"/result/{task_id}?wait={WAIT_S:g}")
            if status["status"] == "completed":
                return status["result"]
            if status["status"] not in ("queued", "running"):
                raise Refused(f"task {task_id} {status['status']}: {status.get('error')}")
        raise Refused(f"task {task_id} had not ended after {DEADLINE_S:g} s")

    def _call(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        self._http.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = self._http.getresponse()
        text = response.read()
        if response.status >= 400:
            raise Refused(f"{method} {path}: {response.status} {text[:200].decode(errors='replace')}")
        answer: dict[str, Any] = orjson.loads(text)
        return answer


class Load:
    """All requests of a demo. ``answers`` grows while it runs, and may be read at any time."""

    def __init__(self, url: str, images: Sequence[Any], *, rounds: int, in_flight: int, jobs: int) -> None:
        self.total = len(images) * rounds
        self.images_per_job = len(images)
        self.answers: list[Answer] = []
        self._url = url
        self._everything = range(len(images))
        self._singles = [orjson.dumps({"inputs": image}) for image in images]
        self._all = orjson.dumps({"inputs": list(images)})
        self._turns = itertools.islice(itertools.cycle(self._everything), self.total)
        self._lock = threading.Lock()
        self._burst_over = threading.Event()
        self._singles_threads = [self._thread(self._burst) for _ in range(in_flight)]
        self._job_threads = [self._thread(self._jobs) for _ in range(jobs)]

    def start(self) -> None:
        """Start all threads, batch jobs first, so that the burst meets a busy appliance."""
        for thread in [*self._job_threads, *self._singles_threads]:
            thread.start()

    def abandon(self) -> None:
        """Start no further requests. Threads that still wait are daemons and are not joined."""
        with self._lock:
            self._turns = itertools.islice(self._everything, 0)
        self._burst_over.set()

    @property
    def running(self) -> bool:
        """Whether answers are still expected. At the end of the burst it also ends the jobs."""
        if not any(thread.is_alive() for thread in self._singles_threads):
            self._burst_over.set()
        return any(thread.is_alive() for thread in [*self._singles_threads, *self._job_threads])

    @property
    def burst_over(self) -> bool:
        """Whether every realtime request has been answered."""
        return self._burst_over.is_set()

    # -- in the threads -------------------------------------------------------------------

    def _thread(self, target: Callable[[Connection], None]) -> threading.Thread:
        def body() -> None:
            connection = Connection(self._url)
            try:
                target(connection)
            finally:
                connection.close()

        return threading.Thread(target=body, daemon=True)

    def _next(self) -> int | None:
        with self._lock:
            return next(self._turns, None)

    def _burst(self, connection: Connection) -> None:
        while (image := self._next()) is not None:
            self._ask(connection, "realtime", [image], self._singles[image])

    def _jobs(self, connection: Connection) -> None:
        while True:
            self._ask(connection, "batch", self._everything, self._all)
            if self._burst_over.is_set():
                return

    def _ask(self, connection: Connection, tier: Tier, images: Sequence[int], body: bytes) -> None:
        path = "/predict" if tier == "realtime" else "/batch_predict"
        begun, results, error = time.monotonic(), [], ""
        try:
            result = connection.infer(path, body)
            results = list(_one_each(result, len(images)))
        except (Refused, OSError, http.client.HTTPException, ValueError, KeyError) as exc:
            connection.close()  # the next request opens a new one
            error = f"{type(exc).__name__}: {exc}"
        answer = Answer(
            tier=tier, images=images, begun=begun, ended=time.monotonic(), results=results, error=error
        )
        self.answers.append(answer)


def _one_each(result: Any, count: int) -> Iterator[dict[str, Any]]:
    """Yield one result per image. Raises Refused if the number differs or one is an error."""
    results = result if isinstance(result, list) else [result]
    if len(results) != count:
        raise Refused(f"{len(results)} results for {count} images")
    for entry in results:
        if "error" in entry:
            raise Refused(f"one of {count} images: {entry['error']}")
        yield entry
