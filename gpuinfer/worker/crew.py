# SPDX-License-Identifier: Apache-2.0
"""A small thread pool; its threads start with the first job."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

#: Maximum number of threads; more only compete with each other.
MOST_THREADS = 32


def cores() -> int:
    """Return the number of cores that this process may use, 1 to 32."""
    return min(MOST_THREADS, max(1, len(os.sched_getaffinity(0))))


class Crew:
    """Runs jobs on ``size`` threads. Jobs must not raise; if one does, ``broken`` gets the exception."""

    def __init__(self, name: str, size: int, broken: Callable[[BaseException], None]) -> None:
        self.size = size
        self._name = name
        self._broken = broken
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def put(self, job: Callable[[], object]) -> None:
        """Queue a job."""
        if not self._threads:
            names = (f"{self._name}-{number}" for number in range(self.size))
            self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
            for thread in self._threads:
                thread.start()
        self._jobs.put(job)

    def close(self) -> None:
        """Let the threads end after their current jobs. They are not joined, as a model's code may hang."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as exc:  # without this, the job's waiter would wait forever
                self._broken(exc)
            del job  # free its data before waiting for the next job
