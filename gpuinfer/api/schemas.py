# SPDX-License-Identifier: Apache-2.0
"""What ``/docs`` shows: schemas and examples, written by hand so that no big body passes through a model.

The examples are real: a digit of the shipped model's test set, and the answer it gets.
"""

from __future__ import annotations

from typing import Any

from gpuinfer.queue.options import OPTIONS
from gpuinfer.settings import QUEUES

JsonSchema = dict[str, Any]

#: Test image 0 of the shipped model: a handwritten 2, shape (1, 8, 8), values 0 to 16.
DIGIT = [
    [
        [0, 2, 15, 13, 1, 0, 0, 0],
        [0, 13, 12, 14, 7, 0, 0, 0],
        [0, 8, 6, 6, 13, 0, 0, 0],
        [0, 0, 0, 5, 15, 0, 0, 0],
        [0, 0, 0, 11, 10, 0, 0, 0],
        [0, 0, 2, 16, 5, 0, 0, 0],
        [0, 0, 11, 16, 13, 14, 12, 0],
        [0, 3, 16, 14, 8, 8, 7, 0],
    ]
]
TASK_ID = "6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21"
_ANSWER: JsonSchema = {
    "class": 2,
    "label": "2",
    "confidence": 0.996117,
    "top_k": [
        {"class": 2, "label": "2", "confidence": 0.996117},
        {"class": 4, "label": "4", "confidence": 0.001469},
        {"class": 9, "label": "9", "confidence": 0.000561},
    ],
    "model": "digits",
    "device": "cuda:0",
}

_INPUT: JsonSchema = {
    "description": "What the model takes: a nested list, or raw bytes as {b64, dtype, shape}; a file as "
    "{b64, name}; text; any JSON; or an object of these by input name.",
}
_OPTIONS: dict[str, JsonSchema] = {name: option.schema() for name, option in OPTIONS.items()}
_OPTIONS["idempotency_key"]["description"] += " Also as the header Idempotency-Key."


def _body(inputs: JsonSchema, bare: JsonSchema, examples: JsonSchema) -> JsonSchema:
    named = {
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": inputs, **_OPTIONS},
        "additionalProperties": False,
    }
    content = {"schema": {"anyOf": [bare, named]}, "examples": examples}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


_LIST: JsonSchema = {"type": "array", "items": {}}
PREDICT_BODY = _body(
    _INPUT,
    {**_LIST, "description": "The bare input."},
    {
        "bare list": {"summary": "One 8x8 digit, for the default model", "value": DIGIT},
        "with options": {
            "summary": "The same with options: most urgent, expires after ten seconds",
            "value": {
                "inputs": DIGIT,
                "model": "digits",
                "queue": "realtime",
                "priority": 9,
                "expires_s": 10,
            },
        },
    },
)
_FILE: JsonSchema = {"type": "string", "format": "binary"}
PREDICT_BODY["requestBody"]["content"] |= {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "description": "The only input as file, or a part for each input, with options beside them.",
            "properties": {"file": _FILE, **_OPTIONS},
            "additionalProperties": True,
        }
    },
    **{
        kind: {"schema": _FILE | {"description": "The only input; options are in the URL, as ?model=resnet."}}
        for kind in ("application/octet-stream", "image/*", "audio/*")
    },
}
BATCH_BODY = _body(
    {"type": "array", "items": _INPUT},
    {"type": "array", "items": _INPUT, "description": "The bare list of inputs."},
    {
        "bare list": {"summary": "Two digits in one job", "value": [DIGIT, DIGIT]},
        "with options": {
            "summary": "The same, named",
            "value": {"inputs": [DIGIT, DIGIT], "model": "digits"},
        },
    },
)

ERROR: JsonSchema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "description": "Stable; what programs match on."},
                "message": {"type": "string"},
                "field": {"type": "string", "description": "What part of the request was wrong."},
            },
        }
    },
}
STATUS: JsonSchema = {
    "type": "object",
    "required": ["task_id", "status"],
    "properties": {
        "task_id": {"type": "string"},
        "status": {"enum": ["queued", "running", "completed", "failed", "expired", "revoked"]},
        "result": {"description": "There when completed."},
        "error": {**ERROR["properties"]["error"], "description": "There when failed, expired or revoked."},
        "worker": {"type": "string", "description": "The worker that began or ended it, where known."},
        "progress": {"type": "number", "description": "Progress from 0 to 1, if the model reports it."},
        "redelivered": {"type": "boolean", "description": "true when this was not its first execution."},
    },
}
#: What ``to_resource`` makes, as far as a caller must know it.
TASK: JsonSchema = {
    "type": "object",
    "required": ["id", "status"],
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": ["queued", "running", "completed", "failed", "expired", "cancelled"]},
        "result": {"description": "There when completed."},
        "error": {**ERROR["properties"]["error"], "description": "There when it ended without a result."},
    },
}
_ACCEPTED: JsonSchema = {
    "type": "object",
    "required": ["task_id"],
    "properties": {"task_id": {"type": "string"}},
}


def _answer(words: str, schema: JsonSchema, examples: JsonSchema) -> JsonSchema:
    named = {name: {"value": value} for name, value in examples.items()}
    return {"description": words, "content": {"application/json": {"schema": schema, "examples": named}}}


def _error(words: str, code: str, message: str, field: str | None = None) -> JsonSchema:
    body = {"code": code, "message": message} | ({"field": field} if field else {})
    return _answer(words, ERROR, {code: {"error": body}})


_BAD_WAIT = _error(
    "A bad parameter.", "bad_input", "must be a number of seconds, 0 or more, got '-1'", "wait"
)
_RETRY_AFTER: JsonSchema = {
    "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
}
_AWAY = _RETRY_AFTER | _error(
    "Redis is away; see Retry-After.", "broker_unavailable", "Redis does not answer"
)
_UNKNOWN_MODEL = _error(
    "The fleet knows no model of that name.",
    "unknown_model",
    "the fleet knows no model 'resnets'; known: digits, resnet",
    "model",
)
_FULL = _RETRY_AFTER | _error(
    "The queue or Redis is full; see Retry-After.",
    "queue_full",
    "as many tasks wait as may: queue.max_waiting is 1000000; what was accepted goes on",
)
_NOT_FOUND = _error(
    "Never submitted, as far as is known.",
    "task_not_found",
    f"no task {TASK_ID}: it was never submitted here, or its result has expired",
    "task_id",
)
_GONE = _error(
    "It was known, and its result has expired or was deleted.",
    "result_gone",
    f"task {TASK_ID} is known, but its result has expired or was deleted",
    "task_id",
)
_TASK = _answer(
    "The task, which has ended while the request waited: failed ones, too.",
    TASK,
    {"completed": {"id": TASK_ID, "status": "completed", "result": _ANSWER, "worker": "gpu0@host"}},
)
SUBMIT_RESPONSES: dict[int | str, JsonSchema] = {
    200: _TASK,
    202: {
        **_answer("Accepted: it will end as a result or an error.", _ACCEPTED, {"id": {"task_id": TASK_ID}}),
        "headers": {"Location": {"description": "Where its result is.", "schema": {"type": "string"}}},
    },
    400: _error(
        "Not JSON, or not the form it is said to be.",
        "malformed_json",
        "the body is not JSON: unexpected character at line 1, column 1",
    ),
    404: _UNKNOWN_MODEL,
    408: _error(
        "The body stalled; the connection is closed.",
        "slow_body",
        "the body stalled: less than 64 KiB came within 10 s, or 1 s while others wait; 65536 bytes had come",
        "body",
    ),
    413: _error(
        "Too large.",
        "payload_too_large",
        "the body is larger than 33570816 bytes; queue.max_payload_bytes is ...",
    ),
    415: _error(
        "Compressed in a way that is not read.",
        "unsupported_encoding",
        "'br' is not read; send the body plain, or as gzip or deflate",
        "Content-Encoding",
    ),
    422: _error("A bad field.", "bad_input", "must be an integer from 0 to 9, got 11", "priority"),
    429: _FULL,
    503: _AWAY,
}
PUT_RESPONSES: dict[int | str, JsonSchema] = {
    **SUBMIT_RESPONSES,
    202: _answer("Accepted, or there already.", TASK, {"queued": {"id": "my-1", "status": "queued"}}),
    409: _error(
        "The id stands for another request.",
        "task_exists",
        "stands for another request already; take another id",
        "task_id",
    ),
}
RESULT_RESPONSES: dict[int | str, JsonSchema] = {
    200: _answer(
        "The state of the task, whatever it is.",
        STATUS,
        {
            "completed": {
                "task_id": TASK_ID,
                "status": "completed",
                "result": _ANSWER,
                "worker": "gpu0@host1",
            },
            "queued": {"task_id": TASK_ID, "status": "queued"},
            "failed": {
                "task_id": TASK_ID,
                "status": "failed",
                "error": {
                    "code": "shape_mismatch",
                    "message": "has shape [8, 8], the manifest wants [1, 8, 8]",
                    "field": "inputs",
                },
            },
        },
    ),
    404: _NOT_FOUND,
    410: _GONE,
    422: _BAD_WAIT,
    503: _AWAY,
}
CANCEL_RESPONSES: dict[int | str, JsonSchema] = {
    200: _answer(
        "Whether it was cancelled, and its state.",
        {**STATUS, "properties": {**STATUS["properties"], "cancelled": {"type": "boolean"}}},
        {
            "cancelled": {
                "task_id": TASK_ID,
                "status": "revoked",
                "error": {"code": "revoked", "message": "it was cancelled"},
                "cancelled": True,
            },
            "too late": {"task_id": TASK_ID, "status": "completed", "result": {}, "cancelled": False},
        },
    ),
    404: _NOT_FOUND,
    410: _GONE,
    422: _error("No task id.", "bad_input", "must be a text of 1 to 200 characters, got ...", "task_id"),
    429: _FULL,
    503: _AWAY,
    "default": {"description": "Any other error.", "content": {"application/json": {"schema": ERROR}}},
}
_COUNT: JsonSchema = {"type": "integer", "minimum": 0}
MODEL: JsonSchema = {
    "type": "object",
    "required": [
        *("name", "default", "serving", "queues", "workers", "missing", "waiting", "paused", "last_seen"),
    ],
    "properties": {
        "name": {"type": "string"},
        "default": {"type": "boolean", "description": "true: the model of requests that name none."},
        "serving": {"type": "boolean", "description": "true: a worker that lives serves it."},
        "queues": {"type": "array", "items": {"enum": list(QUEUES)}, "description": "Served for it now."},
        "workers": {**_COUNT, "description": "Workers that live and serve it."},
        "missing": {
            "type": "object",
            "description": "Worker that should serve it and could not load it -> why.",
            "additionalProperties": {"type": "string"},
        },
        "waiting": {
            "type": "object",
            "description": "Queue -> tasks that wait for it.",
            "properties": dict.fromkeys(QUEUES, _COUNT),
        },
        "paused": {
            "type": "array",
            "items": {"enum": list(QUEUES)},
            "description": "Queues from which workers take nothing for it, until they are resumed.",
        },
        "last_seen": {
            "type": ["string", "null"],
            "format": "date-time",
            "description": "When somebody who could serve it was last seen; null: never, and tasks wait.",
        },
    },
}
_SERVED: JsonSchema = {
    "name": "digits",
    "default": True,
    "serving": True,
    "queues": ["realtime", "default", "batch"],
    "workers": 2,
    "missing": {},
    "waiting": {"realtime": 3, "default": 0, "batch": 120},
    "paused": ["batch"],
    "last_seen": "2026-11-28T16:31:35+00:00",
}
_WAITS: JsonSchema = {
    "name": "resnet",
    "default": False,
    "serving": False,
    "queues": [],
    "workers": 0,
    "missing": {"gpu1@host": "imports = [..., 'torchvision'] failed: ModuleNotFoundError: ..."},
    "waiting": {"realtime": 12, "default": 0, "batch": 0},
    "paused": [],
    "last_seen": "2026-11-27T09:12:04+00:00",
}
MODELS_RESPONSES: dict[int | str, JsonSchema] = {
    200: _answer(
        "All models of the catalogue, by name, and any other that tasks wait for.",
        {"type": "array", "items": MODEL},
        {"one serves, one waits for a worker": [_SERVED, _WAITS]},
    ),
    503: _AWAY,
}
MODEL_RESPONSES: dict[int | str, JsonSchema] = {
    200: _answer("The model, as the list has it.", MODEL, {"served": _SERVED, "waits for a worker": _WAITS}),
    404: _UNKNOWN_MODEL,
    503: _AWAY,
}
_ACCOUNT: JsonSchema = {
    "type": "object",
    "required": ["requests", "errors", "refused", "bytes_in", "bytes_out", "device_s"],
    "properties": {
        "key": {"type": "string", "description": "There unless summed by model."},
        "model": {"type": "string", "description": "There unless summed by key."},
        "requests": _COUNT,
        "errors": {**_COUNT, "description": "Those that failed, or that the client got wrong."},
        "refused": {**_COUNT, "description": "Those for which there was no room: 429 and 503."},
        "bytes_in": _COUNT,
        "bytes_out": _COUNT,
        "device_s": {"type": "number", "description": "A batch's time, divided among its inputs."},
    },
}
USAGE_RESPONSES: dict[int | str, JsonSchema] = {
    200: _answer(
        "What has used most device time comes first.",
        {
            "type": "object",
            "required": ["since", "until", "usage"],
            "properties": {
                "since": {"type": "string", "format": "date-time"},
                "until": {"type": "string", "format": "date-time"},
                "usage": {"type": "array", "items": _ACCOUNT},
            },
        },
        {
            "one key": {
                "since": "2026-11-28T16:00:00+00:00",
                "until": "2026-11-29T16:31:35+00:00",
                "usage": [
                    {
                        "key": "alice",
                        "model": "resnet",
                        "requests": 1200,
                        "errors": 3,
                        "refused": 17,
                        "bytes_in": 52428800,
                        "bytes_out": 98304,
                        "device_s": 61.8,
                    }
                ],
            }
        },
    ),
    422: _error("A bad parameter.", "bad_input", "must be key or model: 'user'", "by"),
    503: _AWAY,
}
METRICS_RESPONSES: dict[int | str, JsonSchema] = {
    200: {
        "description": "Prometheus's text format, or OpenMetrics where `Accept` names it.",
        "content": {
            name: {"schema": {"type": "string"}} for name in ("text/plain", "application/openmetrics-text")
        },
    },
    404: _error(
        "They have an address of their own.",
        "not_found",
        "metrics have an address of their own: metrics.listen is set",
    ),
}
_LIVE: JsonSchema = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["ok"]}},
}
LIVE_RESPONSES: dict[int | str, JsonSchema] = {
    200: _answer("The process runs.", _LIVE, {"ok": {"status": "ok"}})
}
_READY: JsonSchema = {
    "type": "object",
    "required": ["status", "workers", "startable"],
    "properties": {
        "status": {"enum": ["ok", "starting"]},
        "workers": {**_COUNT, "description": "Live workers that serve it."},
        "startable": {**_COUNT, "description": "Instances that are starting, or that a watcher may start."},
        "model": {"type": "string", "description": "There when a model was asked for."},
    },
}
READY_RESPONSES: dict[int | str, JsonSchema] = {
    200: _answer(
        "A worker serves (`ok`), or one may be started (`starting`).",
        _READY,
        {
            "ok": {"status": "ok", "workers": 2, "startable": 6},
            "starting": {"status": "starting", "workers": 0, "startable": 8, "model": "digits"},
        },
    ),
    404: _UNKNOWN_MODEL,
    503: _RETRY_AFTER
    | _error(
        "Nothing serves and nothing may be started, or Redis is away; see Retry-After.",
        "not_ready",
        "no live worker serves any model, and no live watcher may start one (gpu0@host1: masked)",
    ),
}
#: What any operation may answer, in its own words or in these.
#: How a key is shown. By the Unix socket, and by loopback while there are no keys, none is needed.
SECURITY: dict[str, JsonSchema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key: `Authorization: Bearer gpi_...`"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "A key, as `gpi_...`"},
}
COMMON: dict[int, JsonSchema] = {
    401: _error(
        "No key where one is needed, or one that is unknown, revoked or expired; see WWW-Authenticate.",
        "unauthorized",
        "this key is unknown, or was revoked",
    ),
    403: _error(
        "The key does not allow this; or, without a key, a Host or an Origin that is not this server's.",
        "forbidden",
        "the key lab may not use 'resnet'; it may use: digits",
        "model",
    ),
    400: _error(
        "A bad URL, or no HTTP.", "unknown_parameter", "unknown query parameter; none is known here", "waits"
    ),
    422: _error("A bad parameter.", "bad_input", "is given twice in the URL", "wait"),
    503: _RETRY_AFTER
    | _error(
        "Redis is away, or this front is busy; see Retry-After.",
        "front_busy",
        "this front has reached its limit of requests in progress; api.max_requests is 10000",
    ),
}
