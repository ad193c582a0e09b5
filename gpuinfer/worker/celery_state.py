# SPDX-License-Identifier: Apache-2.0
"""Celery's view of a worker's tasks: inspect, revoke, events and signals.

Updating Celery's tables would take much of a small task's time, and they are rarely read. So they are filled
only before they are read.
"""

from __future__ import annotations

from typing import Any

from celery import signals
from celery.worker import state

from gpuinfer.errors import GpuinferError, TaskExpired, TaskRevoked
from gpuinfer.worker.task import Task


class View:
    """A task as Celery's remote control sees it (``inspect active``, ``query_task``, ``revoke``).

    Without slots: Celery sets its event dispatcher on it at each reconnection.
    """

    def __init__(self, task: Task, hostname: str) -> None:
        self._task = task
        self._hostname = hostname
        self.id = task.id
        self.name = task.envelope.task
        self.begun = task.begun

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what ``celery inspect active`` prints; inputs are not shown."""
        task = self._task
        return {
            "id": self.id,
            "name": self.name,
            "args": [f"<{len(task.inputs)} inputs>"],
            "kwargs": {"model": task.model},
            "type": self.name,
            "hostname": self._hostname,
            "time_start": task.time_start,
            "acknowledged": False,
            "delivery_info": task.envelope.properties.get("delivery_info", {})
            | {"redelivered": task.redelivered},
            "worker_pid": None,
        }

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Do nothing: a running batch cannot be interrupted for one of its tasks."""


class CeleryState:
    """Fills Celery's tables, and sends its events and signals. Cheap if nobody listens."""

    def __init__(self, hostname: str) -> None:
        self._hostname = hostname
        #: Task id -> task held by this worker.
        self._tasks: dict[str, Task] = {}
        #: Views in Celery's tables, which only hold weak references.
        self._views: list[View] = []
        #: Celery's event dispatcher; set at each connection.
        self.dispatcher: Any = None
        #: Number of tasks that ended here, with a result or an error.
        self.done = 0

    @property
    def watched(self) -> bool:
        """Whether task events are wanted. Check it first, because building an event's fields is slow.

        The dispatcher may be enabled only for the worker's heartbeat.
        """
        dispatcher = self.dispatcher
        return dispatcher is not None and dispatcher.enabled and "task" in (dispatcher.groups or ("task",))

    def show(self) -> None:
        """Fill Celery's tables with the held tasks, before a control command or a heartbeat."""
        for view in self._views:
            state.task_ready(view)
        self._views = [View(task, self._hostname) for task in self._tasks.values()]
        for view in self._views:
            state.task_reserved(view)
            if view.begun:
                state.active_requests.add(view)

    def _event(self, kind: str, task: Task, **fields: Any) -> None:
        self.dispatcher.send(kind, uuid=task.id, **fields)

    def received(self, task: Task) -> None:
        """A task has been claimed."""
        self._tasks[task.id] = task
        if self.watched:
            headers = task.envelope.headers
            self._event(
                "task-received",
                task,
                name=task.envelope.task,
                args=f"<{len(task.inputs)} inputs>",
                kwargs=f"model={task.model}",
                root_id=headers.get("root_id"),
                parent_id=headers.get("parent_id"),
                retries=task.retries,
                eta=None,
                expires=headers.get("expires"),
            )
        if signals.task_received.receivers:
            signals.task_received.send(sender=self._hostname, request=View(task, self._hostname))

    def started(self, task: Task) -> None:
        """A task's first batch begins."""
        # As state.task_accepted does, but without the slow update of a Counter.
        state.total_count[task.envelope.task] += 1
        state.all_total_count[0] += 1
        if self.watched:
            self._event("task-started", task)
        if signals.task_prerun.receivers:
            signals.task_prerun.send(
                sender=task.envelope.task, task_id=task.id, task=None, args=(), kwargs={}
            )

    def finished(self, task: Task, error: GpuinferError | None, result: Any = None) -> None:
        """A task has ended, or left this worker without running (error and result None)."""
        self.done += error is not None or result is not None
        self._tasks.pop(task.id, None)
        if self.watched:
            self._ended(task, error, result)
        self._signal(task, error, result)

    def _ended(self, task: Task, error: GpuinferError | None, result: Any) -> None:
        if isinstance(error, (TaskRevoked, TaskExpired)):
            self._event(
                "task-revoked", task, terminated=False, signum=None, expired=isinstance(error, TaskExpired)
            )
        elif error is not None:
            self._event("task-failed", task, exception=repr(error), traceback="")
        elif result is not None:
            self._event("task-succeeded", task, result="<not shown>", runtime=task.ran_s)

    def _signal(self, task: Task, error: GpuinferError | None, result: Any) -> None:
        if error is not None and signals.task_failure.receivers:
            signals.task_failure.send(sender=task.envelope.task, task_id=task.id, exception=error)
        elif result is not None and signals.task_success.receivers:
            signals.task_success.send(sender=task.envelope.task, result=result)
        if signals.task_postrun.receivers:
            signals.task_postrun.send(sender=task.envelope.task, task_id=task.id, retval=result)

    def revoked(self, task_id: str) -> bool:
        """Whether ``celery control revoke`` named the task."""
        return bool(state.revoked) and task_id in state.revoked
