# SPDX-License-Identifier: Apache-2.0
"""Task states in Celery's result format ("metas"): written by workers, read by clients and the API.

The JSON begins with ``{"status": "..."`` so that Lua scripts can tell a final state from another one without
parsing. A plain ``AsyncResult(id).get()`` can read it.
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
#: Written when a task is submitted, so that a waiting task can be told from an unknown one.
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
    """The state of a task as a caller sees it. Never changed; not frozen, which would double its cost."""

    id: str
    state: State
    result: Any = None
    error: GpuinferError | None = None
    #: True when this was not the task's first execution.
    redelivered: bool = False
    #: The worker that began or ended it, if known.
    worker: str | None = None
    #: The caller that submitted it; empty: none.
    caller: str = ""
    #: The share of it that is done, 0 to 1, while it runs and if its model reports it.
    progress: float | None = None
    #: When it was submitted, began and ended, as in its meta: unchecked, see ``moment``.
    sent_at: Any = None
    began_at: Any = None
    ended_at: Any = None
    #: Other fields of its meta, unchecked: queue, model, version, priority, expires (seconds since the
    #: epoch), attempt, run_ms, batch_size, metadata.
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.state in FINAL

    def to_dict(self) -> dict[str, Any]:
        """Return it as the API and ``--json`` show it: the state with its result or error."""
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
    """Return the beginning of a meta. Scripts read the task's caller from it, so nothing that a client or a
    model wrote may come before it.
    """
    return {"status": status, "caller": caller} if caller else {"status": status}


def dump(body: Any, option: int = 0) -> bytes:
    """Return JSON for any value: the end of a task must always be written.

    ``option``: orjson's flags.
    """
    try:
        return orjson.dumps(body, option=option)  # no space after a colon; the scripts accept both
    except TypeError:
        return orjson.dumps(_clean(body), option=option)


def _clean(value: Any) -> Any:
    """Return a value for JSON: half surrogate pairs are escaped, and other types become their ``str()``."""
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
    """Return the meta of a task that has begun; ``progress``: the share that is done, 0 to 1, if known."""
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
    """Return the meta of a task that completed, with its arrays as bytes after the JSON if they are large."""
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

    ``exc_message`` contains the constructor's arguments, as in Celery's own back ends.
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
    """Return a notice in place of a meta that is too large to publish: its status, and its size in bytes."""
    status = meta.split(b'"', 4)[3].decode()  # the first of its fields
    return dump(_owned(status, caller_of(meta)) | {"beside": len(meta), "task_id": task_id})


def caller_of(meta: bytes) -> str:
    """Return the caller in a meta of ours; empty: none."""
    found = _OWNED.match(meta)
    return found[1].decode() if found else ""


def parse(task_id: str, meta: bytes | str, *, raw: bool = False) -> TaskStatus:
    """Read a result key's value. ``raw``: arrays after its JSON become ``arrays.Raw``, otherwise base64.

    Raises UnreadableResult if it is not in Celery's result format.
    """
    try:
        body = orjson.loads(meta)
    except orjson.JSONDecodeError:
        pass
    else:
        if not isinstance(body, dict):
            raise unreadable(task_id, "JSON, but not an object")
        if "arrays" not in body:  # arrays whose bytes are all white space parse as JSON, too
            return from_body(task_id, body)
    import json

    try:
        found = binary.read(meta, raw=raw) if isinstance(meta, bytes) else None
        if found is None:
            found = json.loads(meta, parse_constant=lambda _: math.nan)
    except (ValueError, TypeError, LookupError, RecursionError):
        raise unreadable(task_id, "not JSON") from None
    if not isinstance(found, dict):
        raise unreadable(task_id, "JSON, but not an object")
    return from_body(task_id, found)


def unreadable(task_id: str, what: str) -> UnreadableResult:
    """Return the error for a value under a task's result key that is not the state of a task."""
    return UnreadableResult(
        f"the value of {RESULT_PREFIX}{task_id[:200]} in Redis is {what}: another program uses that key",
        "task_id",
    )


def parse_many(metas: bytes) -> list[TaskStatus]:
    """Read a message of a reply channel: the metas of a batch, as a list.

    A status that is not final comes from a notice: read the final state from the task's result key.
    """
    try:
        bodies = orjson.loads(metas)
    except orjson.JSONDecodeError:
        import json

        bodies = json.loads(metas, parse_constant=lambda _: math.nan)
    return [from_body(str(body["task_id"]), body) for body in bodies]


def from_body(task_id: str, body: dict[str, Any]) -> TaskStatus:
    """Return the state in a parsed meta."""
    state = _STATES.get(str(body.get("status")), "queued")
    if "beside" in body:
        state = "running"
    about = body.get("about")
    about = about if isinstance(about, dict) else {}
    caller = body.get("caller") or about.get("caller")  # the latter while it waits
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
    """Parse a time of a meta: seconds since the epoch, or text as Celery writes it. None if it is neither."""
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
