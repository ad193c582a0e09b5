# SPDX-License-Identifier: Apache-2.0
"""Schemas for ``/docs`` of tasks as resources."""

from __future__ import annotations

from typing import Any

from gpuinfer.api import schemas
from gpuinfer.api.schemas import TASK_ID, JsonSchema, Responses
from gpuinfer.queue.history import MOST, STATUSES, USUAL

_TIME: JsonSchema = {"type": ["string", "null"], "format": "date-time"}
_MAYBE_TEXT: JsonSchema = {"type": ["string", "null"]}
_MAYBE_NUMBER: JsonSchema = {"type": ["number", "null"]}
TASK: JsonSchema = {
    "type": "object",
    "required": ["id", "status", "attempt", "redelivered", "metadata", "urls"],
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": ["queued", "running", *STATUSES]},
        "model": _MAYBE_TEXT,
        "version": {**_MAYBE_TEXT, "description": "Beginning of the digest of the model that ran it."},
        "queue": _MAYBE_TEXT,
        "priority": {"type": ["integer", "null"]},
        "created_at": _TIME,
        "started_at": _TIME,
        "completed_at": _TIME,
        "expires_at": {**_TIME, "description": "It must not start after this time."},
        "attempt": {"type": "integer", "minimum": 1, "description": "Number of deliveries to a worker."},
        "redelivered": {"type": "boolean"},
        "position": {
            "type": ["integer", "null"],
            "description": "While it waits, estimated: 1 is next in its queue and priority, 0 (or 1) is "
            "already with a worker. Tasks of higher priority run before it. null: not known.",
        },
        "estimated_start_at": {
            **_TIME,
            "description": "While it waits, estimated from the rate of its queue; null: not known.",
        },
        "progress": {"type": "number", "description": "0 to 1 while it runs, if the model reports it."},
        "result": {"description": "Present when completed."},
        "error": {
            **schemas.ERROR["properties"]["error"],
            "description": "Present when it ended without a result.",
        },
        "metrics": {
            "type": "object",
            "description": "Present when it has ended.",
            "properties": {"queue_ms": _MAYBE_NUMBER, "run_ms": _MAYBE_NUMBER, "batch_size": _MAYBE_NUMBER},
        },
        "worker": _MAYBE_TEXT,
        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
        "urls": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_URL = f"/tasks/{TASK_ID}"
_EXAMPLE = {
    "id": TASK_ID,
    "status": "completed",
    "model": "digits",
    "version": "sha256:3b1f0c6f9f6a",
    "queue": "realtime",
    "priority": 0,
    "created_at": "2026-11-28T16:31:35.102000+00:00",
    "started_at": "2026-11-28T16:31:35.104211+00:00",
    "completed_at": "2026-11-28T16:31:35.106120+00:00",
    "expires_at": None,
    "attempt": 1,
    "redelivered": False,
    "result": {"class": 2, "label": "2", "confidence": 0.996117},
    "metrics": {"queue_ms": 2.211, "run_ms": 0.913, "batch_size": 3},
    "worker": "gpu0@host1",
    "metadata": {"user": "7"},
    "urls": {"self": _URL, "result": f"{_URL}/result", "cancel": f"{_URL}/cancel", "retry": f"{_URL}/retry"},
}


def _parameter(name: str, schema: JsonSchema, words: str) -> JsonSchema:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": words}


WAIT_PARAMETER: JsonSchema = {
    "parameters": [
        {"name": "task_id", "in": "path", "required": True, "schema": {"type": "string"}},
        _parameter(
            "wait",
            {"type": "number", "minimum": 0},
            "Seconds to wait for the task to end, at most api.max_wait_s.",
        ),
    ]
}
LIST_PARAMETERS: JsonSchema = {
    "parameters": [
        _parameter("status", {"enum": list(STATUSES)}, "Only tasks with this status."),
        _parameter("model", {"type": "string"}, "Only tasks of this model."),
        _parameter("before", {"type": "string"}, "Only tasks that ended before this: ISO 8601 or Unix time."),
        _parameter(
            "limit",
            {"type": "integer", "minimum": 1, "maximum": MOST, "default": USUAL},
            "Maximum number of tasks.",
        ),
    ]
}
_UNKNOWN = schemas.error_response(
    "Unknown parameter.", "unknown_parameter", "unknown query parameter; known here: wait", "wiat"
)
_STATE = schemas.error_response(
    "The state of the task does not allow this.",
    "wrong_state",
    f"task {TASK_ID} has not ended; cancel it first",
    "task_id",
)
_OTHER: JsonSchema = {
    "description": "Any other error.",
    "content": {"application/json": {"schema": schemas.ERROR}},
}
_ERRORS: Responses = {
    400: _UNKNOWN,
    404: schemas.NOT_FOUND,
    410: schemas.GONE,
    422: schemas.BAD_WAIT,
    503: schemas.AWAY,
    "default": _OTHER,
}


def _task(words: str) -> JsonSchema:
    return schemas.response(words, TASK, {"completed": _EXAMPLE})


TASK_RESPONSES: Responses = {200: _task("The task, in any state."), **_ERRORS}
BARE_RESPONSES: Responses = {
    200: {
        "description": "The result.",
        "content": {
            "application/json": {"schema": {}},
            "text/plain": {"schema": {"type": "string"}},
            **{
                kind: {"schema": {"type": "string", "format": "binary"}}
                for kind in ("application/octet-stream", "application/x-npy", "image/png")
            },
        },
    },
    202: _task("It has not ended."),
    406: schemas.error_response(
        "The result is not available in an accepted type.",
        "not_acceptable",
        "the result is available as application/json, not as 'application/x-npy'; it is not an array of "
        "numbers",
        "Accept",
    ),
    **_ERRORS,
}
CANCEL_RESPONSES: Responses = {200: _task("It is cancelled."), 409: _STATE, **_ERRORS}
RETRY_RESPONSES: Responses = {202: _task("It is queued again."), 409: _STATE, **_ERRORS}
DELETE_RESPONSES: Responses = {204: {"description": "It was deleted."}, 409: _STATE, **_ERRORS}

_ENDED: JsonSchema = {
    "type": "object",
    "required": ["id", "status", "queue", "model", "completed_at", "urls"],
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": list(STATUSES)},
        "queue": _MAYBE_TEXT,
        "model": _MAYBE_TEXT,
        "completed_at": _TIME,
        "error": {"type": "object", "properties": {"code": {"type": "string"}}},
        "urls": TASK["properties"]["urls"],
    },
}


def _plain(words: str, schema: dict[str, Any], example: Any) -> Responses:
    return {
        200: schemas.response(words, schema, {"example": example}),
        400: _UNKNOWN,
        503: schemas.AWAY,
        "default": _OTHER,
    }


LIST_RESPONSES = _plain(
    "Ended tasks, the newest first.",
    {
        "type": "object",
        "required": ["tasks", "next"],
        "properties": {"tasks": {"type": "array", "items": _ENDED}, "next": _MAYBE_TEXT},
    },
    {"tasks": [], "next": None},
)
LIST_RESPONSES[422] = schemas.error_response(
    "A bad parameter.", "bad_input", f"must be one of {', '.join(STATUSES)}, got 'done'", "status"
)
QUEUES_RESPONSES = _plain(
    "The queues.",
    {"type": "object", "required": ["queues", "waiting", "in_flight", "dead_letters"]},
    {"queues": {}, "waiting": 0, "later": 0, "paused": [], "in_flight": {}, "dead_letters": 0},
)
WORKERS_RESPONSES = _plain(
    "All workers that have not left the fleet.",
    {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["worker", "alive", "seen_s"],
            "properties": {
                "worker": {"type": "string"},
                "alive": {"type": "boolean"},
                "seen_s": {"type": "number", "description": "Seconds since its last heartbeat."},
            },
        },
    },
    [],
)
