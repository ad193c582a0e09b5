# SPDX-License-Identifier: Apache-2.0
"""Task states: Celery's result format, written by the worker and read by clients and the API.

The JSON begins with ``{"status": "..."`` so that the Lua scripts can tell a final state from a
passing one without parsing. A plain ``AsyncResult(id).get()`` reads it as it reads Celery's own.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from gpuinfer import errors
from gpuinfer.errors import GpuinferError, TaskExpired, TaskFailed, TaskRevoked, UnreadableResult
from gpuinfer.queue import binary
from gpuinfer.queue.arrays import BESIDE_BYTES
from gpuinfer.queue.keys import RESULT_PREFIX

State = Literal["queued", "running", "completed", "failed", "expired", "revoked"]
FINAL: frozenset[State] = frozenset({"completed", "failed", "expired", "revoked"})
#: What a producer writes when it submits, so that a waiting task can be told from an unknown one.
PENDING_META = b'{"status": "PENDING", "result": null}'

#: When a task was submitted and began to run: ``sent_at`` and ``began_at``, in seconds since the epoch.
Times = Mapping[str, float | None]

_OWNED = re.compile(rb'\{"status":"[A-Z]+","caller":"([^"\\]+)"')
_STATES: dict[str, State] = {
    "PENDING": "queued",
    "RECEIVED": "queued",
    "RETRY": "queued",
    "STARTED": "running",
    "SUCCESS": "completed",
    "FAILURE": "failed",
    "REVOKED": "revoked",
}


@dataclass(kw_only=True, slots=True)
class TaskStatus:
    """The state of a task as a caller sees it. Never changed; to be frozen would cost twice its making."""

    id: str
    state: State
    result: Any = None
    error: GpuinferError | None = None
    #: True when this was not the task's first execution.
    redelivered: bool = False
    #: Which worker began or ended it, where known.
    worker: str | None = None
    #: Whose it is; empty: nobody's in particular.
    caller: str = ""
    #: How much of it is done, 0 to 1, while it runs and where its model tells.
    progress: float | None = None
    #: When it was submitted, began and ended, as its meta has it: unchecked, see ``moment``.
    sent_at: Any = None
    began_at: Any = None
    ended_at: Any = None
    #: What else its meta tells, unchecked: queue, model, version, priority, expires (seconds since the
    #: epoch), attempt, run_ms, batch_size, metadata.
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.state in FINAL

    def to_dict(self) -> dict[str, Any]:
        """Return what the API and ``--json`` show: the state with its result or its error."""
        body: dict[str, Any] = {"task_id": self.id, "status": self.state}
        if self.state == "completed":
            body["result"] = self.result
        if self.error is not None:
            body["error"] = self.error.to_dict()
        if self.worker:
            body["worker"] = self.worker
        if self.progress is not None:
            body["progress"] = self.progress
        if self.redelivered:
            body["redelivered"] = True
        return body

    def unwrap(self) -> Any:
        """Return the result; raise the error of a task that did not complete."""
        if self.error is not None:
            raise self.error
        return self.result


def _meta(
    status: str,
    task_id: str,
    result: Any,
    worker: str,
    times: Times | None,
    about: Mapping[str, Any] | None,
    *,
    redelivered: bool,
    caller: str,
    more: Mapping[str, Any] | None = None,
) -> bytes:
    body = _owned(status, caller) | {
        "result": result,
        "traceback": None,
        "children": [],
        "date_done": datetime.now(UTC),
        "task_id": task_id,
        "worker": worker,
    }
    if times:
        for name, at in times.items():
            if at is not None:
                body[name] = at
    if redelivered:
        body["redelivered"] = True
    if about:
        body["about"] = about
    if more:
        body |= more
    return dump(body)


def _owned(status: str, caller: str) -> dict[str, Any]:
    """Return the beginning of a meta. The scripts read there whose task it is: nothing that a client or a
    model has written stands before it.
    """
    return {"status": status, "caller": caller} if caller else {"status": status}


def dump(body: Any, option: int = 0) -> bytes:
    """Return JSON for whatever has come of a task: an end that could not be written would be none.

    ``option``: orjson's flags.
    """
    try:
        return orjson.dumps(body, option=option)  # no space after a colon; the scripts accept both
    except TypeError:
        return orjson.dumps(_clean(body), option=option)


def _clean(value: Any) -> Any:
    """Return a value that JSON can hold: half a surrogate pair is spelt out, what is no data is described."""
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value).encode(errors="backslashreplace").decode()


def started(
    task_id: str,
    worker: str,
    pid: int,
    progress: float | None = None,
    *,
    times: Times | None = None,
    about: Mapping[str, Any] | None = None,
    caller: str = "",
) -> bytes:
    """Return the meta of a task that has begun; ``progress``: how much of it is done, 0 to 1, where known."""
    where: dict[str, Any] = {"pid": pid, "hostname": worker}
    if progress is not None:
        where["progress"] = progress
    body = _owned("STARTED", caller) | {"result": where, "task_id": task_id}
    for name, at in (times or {}).items():
        if at is not None:
            body[name] = at
    return dump(body | {"about": about} if about else body)


def success(
    task_id: str,
    result: Any,
    *,
    worker: str,
    redelivered: bool = False,
    times: Times | None = None,
    about: Mapping[str, Any] | None = None,
    caller: str = "",
) -> bytes:
    """Return the meta of a task that completed."""
    return _meta("SUCCESS", task_id, result, worker, times, about, redelivered=redelivered, caller=caller)


def success_in_bytes(
    task_id: str,
    result: Any,
    *,
    worker: str,
    redelivered: bool = False,
    times: Times | None = None,
    about: Mapping[str, Any] | None = None,
    caller: str = "",
) -> bytes:
    """Return the meta of a task that completed, with its arrays behind the JSON where they are large."""
    rest, placed = binary.split(result)
    small = binary.size_of(placed) <= BESIDE_BYTES
    result = binary.inlined(rest, placed) if small else rest
    more: dict[str, Any] = {} if small else {"arrays": binary.table(placed)}
    head = _meta(
        "SUCCESS", task_id, result, worker, times, about, redelivered=redelivered, caller=caller, more=more
    )
    return head if small else binary.join(head, placed)


def failure(
    task_id: str,
    error: BaseException,
    *,
    worker: str,
    redelivered: bool = False,
    times: Times | None = None,
    about: Mapping[str, Any] | None = None,
    caller: str = "",
) -> bytes:
    """Return the meta of a task that failed, expired or was revoked.

    ``exc_message`` holds the constructor's arguments, as Celery's own back ends write it.
    """
    status = "REVOKED" if isinstance(error, (TaskExpired, TaskRevoked)) else "FAILURE"
    args = list(error.args) if isinstance(error, GpuinferError) else [str(error)]
    result = {
        "exc_type": type(error).__name__,
        "exc_message": args,
        "exc_module": type(error).__module__,
    }
    return _meta(status, task_id, result, worker, times, about, redelivered=redelivered, caller=caller)


def notice(task_id: str, meta: bytes) -> bytes:
    """Return what stands for an end whose meta is too large: its status, and its size in bytes."""
    status = meta.split(b'"', 4)[3].decode()  # the first of its fields
    return dump(_owned(status, caller_of(meta)) | {"beside": len(meta), "task_id": task_id})


def caller_of(meta: bytes) -> str:
    """Return whose task a meta of ours is, by its beginning."""
    found = _OWNED.match(meta)
    return found[1].decode() if found else ""


def parse(task_id: str, meta: bytes | str, *, raw: bool = False) -> TaskStatus:
    """Read a result key's value. ``raw``: arrays that lie behind its JSON are ``arrays.Raw``, else in base64.

    Raises UnreadableResult for one that no worker of Celery's has written.
    """
    try:
        body = orjson.loads(meta)
    except orjson.JSONDecodeError:
        pass
    else:
        if not isinstance(body, dict):
            raise unreadable(task_id, "JSON, but no object")
        if "arrays" not in body:  # bytes of white space would pass for the end of the JSON
            return from_body(task_id, body)
    import json

    try:
        found = binary.read(meta, raw=raw) if isinstance(meta, bytes) else None
        if found is None:
            found = json.loads(meta, parse_constant=lambda _: math.nan)
    except (ValueError, TypeError, LookupError, RecursionError):
        raise unreadable(task_id, "no JSON") from None
    if not isinstance(found, dict):
        raise unreadable(task_id, "JSON, but no object")
    return from_body(task_id, found)


def unreadable(task_id: str, what: str) -> UnreadableResult:
    """Return the error for what stands under a task's key and is no state of a task."""
    return UnreadableResult(
        f"what stands under {RESULT_PREFIX}{task_id[:200]} in Redis is {what}: another program uses that key",
        "task_id",
    )


def parse_many(metas: bytes) -> list[TaskStatus]:
    """Read what is published on a reply channel: the metas of a batch, in a list.

    A status that is not final is a notice: look under the task's key, where its end stands.
    """
    try:
        bodies = orjson.loads(metas)
    except orjson.JSONDecodeError:
        import json

        bodies = json.loads(metas, parse_constant=lambda _: math.nan)
    return [from_body(str(body["task_id"]), body) for body in bodies]


def from_body(task_id: str, body: dict[str, Any]) -> TaskStatus:
    """Return the state that a meta tells."""
    state = _STATES.get(str(body.get("status")), "queued")
    if "beside" in body:
        state = "running"
    about = body.get("about")
    about = about if isinstance(about, dict) else {}
    caller = body.get("caller") or about.get("caller")  # while it waits, there
    result, error = body.get("result"), None
    worker, progress = body.get("worker"), None
    if state == "running" and isinstance(result, dict):
        worker, progress, result = result.get("hostname"), result.get("progress"), None
    elif state in ("failed", "revoked"):
        error, result = _rebuild(result), None
        if isinstance(error, TaskExpired):
            state = "expired"
    return TaskStatus(
        id=task_id,
        state=state,
        result=result,
        error=error,
        redelivered=bool(body.get("redelivered")),
        worker=worker,
        caller=caller if isinstance(caller, str) else "",
        progress=progress if isinstance(progress, int | float) else None,
        sent_at=body.get("sent_at"),
        began_at=body.get("began_at"),
        ended_at=body.get("date_done"),
        about=about,
    )


def moment(value: object) -> datetime | None:
    """Return a moment of a meta: seconds since the epoch, or text as Celery writes it."""
    try:
        if isinstance(value, str):
            at = datetime.fromisoformat(value)
            return at if at.tzinfo else at.replace(tzinfo=UTC)
        return datetime.fromtimestamp(value, UTC) if isinstance(value, float) else None
    except (ValueError, OverflowError, OSError):
        return None


def _rebuild(result: Any) -> GpuinferError:
    if not isinstance(result, dict) or "exc_type" not in result:
        return TaskFailed(str(result))
    name, args = str(result["exc_type"]), result.get("exc_message")
    args = args if isinstance(args, list) else [str(args)]
    if result.get("exc_module") == errors.__name__:
        cls = getattr(importlib.import_module(errors.__name__), name, None)
        if isinstance(cls, type) and issubclass(cls, GpuinferError):
            return cls(*args[:2])
    if name == "TaskRevokedError":
        return TaskRevoked(", ".join(map(str, args)))
    return TaskFailed(f"{name}: {', '.join(map(str, args))}")
