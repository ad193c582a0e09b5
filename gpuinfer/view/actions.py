# SPDX-License-Identifier: Apache-2.0
"""The actions and task queries of ``gpuinfer top``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from gpuinfer.client import Client
from gpuinfer.journal.story_cli import lines
from gpuinfer.queue.connection import connect, typed_errors, user_of
from gpuinfer.queue.drained import set_drained
from gpuinfer.queue.purge import set_paused
from gpuinfer.settings import Loaded

#: Maximum number of listed tasks, the newest first.
MOST_TASKS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """An ended task."""

    id: str
    status: str
    queue: str = ""
    model: str = ""
    #: When it ended: HH:MM:SS in local time.
    at: str = ""
    error: str = ""


class Actions(Protocol):
    """The actions. All block, and raise GpuinferError."""

    def drain(self, worker: str, drained: bool) -> bool:
        """Drain a worker (``gpu0@host``), or resume it; return whether that changed anything."""

    def pause(self, queue: str, paused: bool) -> bool:
        """Pause a queue (``batch``, ``batch.resnet``), or resume it; return whether that changed anything."""

    def tasks(self) -> Sequence[TaskRow]:
        """Return the tasks that ended last, the newest first."""

    def retry(self, task_id: str) -> None:
        """Return a failed task or a dead letter to its queue."""

    def log(self, task_id: str) -> Sequence[str]:
        """Return the log of a task, from the journal and its result record."""


class OnFleet:
    """The actions on a real fleet."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._client = Client(loaded.settings)
        self._redis = connect(loaded.settings.broker)
        self._user = user_of(loaded.settings.broker)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()
        self._redis.close()

    def drain(self, worker: str, drained: bool) -> bool:
        """Drain a worker, or resume it."""
        with typed_errors(self._user):
            return set_drained(self._redis, worker, drained)

    def pause(self, queue: str, paused: bool) -> bool:
        """Pause a queue, or resume it."""
        with typed_errors(self._user):
            return set_paused(self._redis, queue, paused)

    def tasks(self) -> Sequence[TaskRow]:
        """Return the tasks that ended last."""
        return [
            TaskRow(
                id=one.id,
                status=one.status,
                queue=one.queue,
                model=one.model,
                at=datetime.fromtimestamp(one.at / 1e6).astimezone().strftime("%H:%M:%S"),
                error=one.error,
            )
            for one in self._client.tasks(limit=MOST_TASKS).tasks
        ]

    def retry(self, task_id: str) -> None:
        """Retry a task."""
        self._client.retry(task_id)

    def log(self, task_id: str) -> Sequence[str]:
        """Return the log of a task."""
        return lines(self._loaded, task_id)
