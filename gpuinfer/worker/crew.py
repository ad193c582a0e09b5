# SPDX-License-Identifier: Apache-2.0
"""A few threads that take jobs in turn; started with the first job."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

#: Beyond this number threads only get into each other's way.
MOST_THREADS = 32


def cores() -> int:
    """Return how many threads there are cores for that this process may use; at least 1, at most 32."""
    return min(MOST_THREADS, max(1, len(os.sched_getaffinity(0))))


class Crew:
    """Runs jobs on ``size`` threads. They must not raise: ``broken`` is called with what one raises."""

    def __init__(self, name: str, size: int, broken: Callable[[BaseException], None]) -> None:
        self.size = size
        self._name = name
        self._broken = broken
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def put(self, job: Callable[[], object]) -> None:
        """Have a job done after those before it."""
        if not self._threads:
            names = (f"{self._name}-{number}" for number in range(self.size))
            self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
            for thread in self._threads:
                thread.start()
        self._jobs.put(job)

    def close(self) -> None:
        """Let the threads end after what they do now; nobody waits for them: a model's code may hang."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as exc:  # somebody waits for this job for ever
                self._broken(exc)
            del job  # and what it holds, before the next one comes
