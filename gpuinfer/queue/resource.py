# SPDX-License-Identifier: Apache-2.0
"""A task as ``/tasks/{id}`` shows it, made from its state: one function for all answers that contain a task.

Times are ISO 8601 in UTC. Fields that every task has are null if unknown; other fields are left out.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import quote

from gpuinfer.queue.results import TaskStatus, moment

#: State of a task -> its name here, if different.
_WORDS = {"revoked": "cancelled"}
#: An id that needs no quoting in a URL.
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
#: A time of this century that already has the format used here, as our workers write it.
_WRITTEN = re.compile(
    r"20\d\d-(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d\.(?!0{6})\d{6}\+00:00"
)


class Place(NamedTuple):
    """The place of a waiting task."""

    #: Its position in its list, 1 for the next one; 0: it was claimed; None: not known. A task at 1 may have
    #: been claimed, too.
    position: int | None = None
    #: Estimated start if the queue keeps its present rate, in seconds since the epoch; None: not known.
    starts_at: float | None = None


def to_resource(status: TaskStatus, place: Place | None = None) -> dict[str, Any]:
    """Return a task for JSON: ``id``, ``status``, ``model``, ``version``, ``queue``, ``priority``, times,
    ``attempt``, ``redelivered``, ``result`` or ``error``, ``metrics``, ``worker``, ``metadata``, ``urls``,
    and ``traceparent`` if there is one.

    ``place``: for the ``position`` and ``estimated_start_at`` of a waiting task.
    """
    about, state = status.about, status.state
    body: dict[str, Any] = {
        "id": status.id,
        "status": _WORDS.get(state, state),
        "model": _text(about.get("model")),
        "version": _text(about.get("version")),
        "queue": _text(about.get("queue")),
        "priority": about.get("priority", 0 if about else None),
        "created_at": written(status.sent_at),
        "started_at": written(status.began_at),
        "completed_at": written(status.ended_at),
        "expires_at": written(about.get("expires")),
        "attempt": about.get("attempt", 1),
        "redelivered": status.redelivered,
    }
    if state == "queued":
        body["position"] = None if place is None else place.position
        body["estimated_start_at"] = None if place is None else written(place.starts_at)
    if status.progress is not None:
        body["progress"] = status.progress
    if state == "completed":
        body["result"] = status.result
    if status.error is not None:
        body["error"] = status.error.to_dict()
    if status.final:
        body["metrics"] = metrics(status)
    body["worker"] = status.worker or None
    metadata = about.get("metadata")
    body["metadata"] = metadata if isinstance(metadata, dict) else {}
    if traceparent := _text(about.get("traceparent")):
        body["traceparent"] = traceparent
    body["urls"] = urls(status.id)
    return body


def metrics(status: TaskStatus) -> dict[str, float | int | None]:
    """Return how long a task waited and ran, in milliseconds, and the size of its batch.

    ``queue_ms`` is the time from submission to its first batch, which may be measured with the clocks of two
    hosts; ``run_ms`` is the duration of its batches.
    """
    sent, began = status.sent_at, status.began_at
    queue_ms = None
    if isinstance(sent, float) and isinstance(began, float):
        queue_ms = round(max(0.0, began - sent) * 1000, 3)
    about = status.about
    return {"queue_ms": queue_ms, "run_ms": about.get("run_ms"), "batch_size": about.get("batch_size")}


def urls(task_id: str) -> dict[str, str]:
    """Return the URLs of a task and of the actions on it."""
    url = "/tasks/" + (task_id if _PLAIN.fullmatch(task_id) else quote(task_id, safe=""))
    return {"self": url, "result": f"{url}/result", "cancel": f"{url}/cancel", "retry": f"{url}/retry"}


def written(at: Any) -> str | None:
    """Return a time as ISO 8601 in UTC; None if it is None or not a time."""
    if at is None:
        return None
    if type(at) is float:
        try:
            return datetime.fromtimestamp(at, UTC).isoformat()
        except (ValueError, OverflowError, OSError):
            return None
    if type(at) is str and _WRITTEN.fullmatch(at):
        return at
    found = moment(at)
    return None if found is None else found.astimezone(UTC).isoformat()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
