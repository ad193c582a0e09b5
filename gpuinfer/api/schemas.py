# SPDX-License-Identifier: Apache-2.0
"""What the descriptions of all routes in ``/docs`` share: errors, examples, and how a key is sent.

The examples are real: a digit of the shipped model's test set, and its result.
"""

from __future__ import annotations

from typing import Any

JsonSchema = dict[str, Any]
#: HTTP status, or ``default`` -> its description, as OpenAPI has it.
Responses = dict[int | str, JsonSchema]

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
RESULT: JsonSchema = {
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

ERROR: JsonSchema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "description": "Stable; for programs."},
                "message": {"type": "string"},
                "field": {"type": "string", "description": "The wrong part of the request."},
            },
        }
    },
}


def response(words: str, schema: JsonSchema, examples: JsonSchema) -> JsonSchema:
    """Return the description of a response in JSON. ``examples``: name -> value."""
    named = {name: {"value": value} for name, value in examples.items()}
    return {"description": words, "content": {"application/json": {"schema": schema, "examples": named}}}


def error_response(words: str, code: str, message: str, field: str | None = None) -> JsonSchema:
    """Return the description of an error, with one as its example."""
    body = {"code": code, "message": message} | ({"field": field} if field else {})
    return response(words, ERROR, {code: {"error": body}})


BAD_WAIT = error_response(
    "Invalid parameter.", "bad_input", "must be a number of seconds, 0 or more, got '-1'", "wait"
)
RETRY_AFTER: JsonSchema = {
    "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
}
AWAY = RETRY_AFTER | error_response(
    "Redis is unavailable; see Retry-After.", "broker_unavailable", "Redis does not answer"
)
UNKNOWN_MODEL = error_response(
    "The model is unknown to the fleet.",
    "unknown_model",
    "the fleet knows no model 'resnets'; known: digits, resnet",
    "model",
)
FULL = RETRY_AFTER | error_response(
    "The queue or Redis is full; see Retry-After.",
    "queue_full",
    "too many tasks are waiting: queue.max_waiting is 1000000; accepted tasks continue",
)
NOT_FOUND = error_response(
    "The id is unknown.",
    "task_not_found",
    f"no task {TASK_ID}: it was never submitted here, or its result has expired",
    "task_id",
)
GONE = error_response(
    "The task is known, but its result has expired or was deleted.",
    "result_gone",
    f"task {TASK_ID} is known, but its result has expired or was deleted",
    "task_id",
)
#: Ways to send a key. The Unix socket needs none, nor does loopback while there are no keys.
SECURITY: dict[str, JsonSchema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key: `Authorization: Bearer gpi_...`"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "A key: `gpi_...`"},
}
#: Answers that any operation may give, unless it documents its own.
COMMON: dict[int, JsonSchema] = {
    401: error_response(
        "The key is missing, unknown, revoked or expired; see WWW-Authenticate.",
        "unauthorized",
        "this key is unknown or was revoked",
    ),
    403: error_response(
        "The key does not allow this; or, without a key, the Host or Origin is not this server's.",
        "forbidden",
        "the key lab may not use 'resnet'; it may use: digits",
        "model",
    ),
    400: error_response(
        "An invalid URL or invalid HTTP.",
        "unknown_parameter",
        "unknown query parameter; this route has none",
        "waits",
    ),
    422: error_response("Invalid parameter.", "bad_input", "must be given only once in the URL", "wait"),
    503: RETRY_AFTER
    | error_response(
        "Redis is unavailable or the API is busy; see Retry-After.",
        "front_busy",
        "too many requests are in progress; api.max_requests is 10000",
    ),
}
