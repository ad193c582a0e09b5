# SPDX-License-Identifier: Apache-2.0
"""What ``/docs`` shows of submissions and results; by hand: no big body passes through a pydantic model."""

from __future__ import annotations

from gpuinfer.api.schemas import (
    AWAY,
    BAD_WAIT,
    DIGIT,
    ERROR,
    FULL,
    GONE,
    NOT_FOUND,
    RESULT,
    TASK_ID,
    UNKNOWN_MODEL,
    JsonSchema,
    Responses,
    error_response,
    response,
)
from gpuinfer.queue.options import OPTIONS

_INPUT: JsonSchema = {
    "description": "Input of the model: a nested list, or raw bytes as {b64, dtype, shape}; a file as "
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
    {**_LIST, "description": "Only the input."},
    {
        "bare list": {"summary": "One 8x8 digit, for the default model", "value": DIGIT},
        "with options": {
            "summary": "The same with options: highest priority, expires after ten seconds",
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
            "description": "The only input as a file, or one part per input; options are further parts.",
            "properties": {"file": _FILE, **_OPTIONS},
            "additionalProperties": True,
        }
    },
    **{
        kind: {
            "schema": _FILE
            | {"description": "The only input; options are in the URL, such as ?model=resnet."}
        }
        for kind in ("application/octet-stream", "image/*", "audio/*")
    },
}
BATCH_BODY = _body(
    {"type": "array", "items": _INPUT},
    {"type": "array", "items": _INPUT, "description": "Only the list of inputs."},
    {
        "bare list": {"summary": "Two digits in one job", "value": [DIGIT, DIGIT]},
        "with options": {
            "summary": "The same, named",
            "value": {"inputs": [DIGIT, DIGIT], "model": "digits"},
        },
    },
)

STATUS: JsonSchema = {
    "type": "object",
    "required": ["task_id", "status"],
    "properties": {
        "task_id": {"type": "string"},
        "status": {"enum": ["queued", "running", "completed", "failed", "expired", "revoked"]},
        "result": {"description": "Present when completed."},
        "error": {**ERROR["properties"]["error"], "description": "Present when failed, expired or revoked."},
        "worker": {"type": "string", "description": "The worker that started or ended it, if known."},
        "progress": {"type": "number", "description": "Progress from 0 to 1, if the model reports it."},
        "redelivered": {"type": "boolean", "description": "true if it was executed more than once."},
    },
}
#: What ``to_resource`` makes, as far as a caller must know it.
TASK: JsonSchema = {
    "type": "object",
    "required": ["id", "status"],
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": ["queued", "running", "completed", "failed", "expired", "cancelled"]},
        "result": {"description": "Present when completed."},
        "error": {**ERROR["properties"]["error"], "description": "Present when it ended without a result."},
    },
}
_ACCEPTED: JsonSchema = {
    "type": "object",
    "required": ["task_id"],
    "properties": {"task_id": {"type": "string"}},
}


_TASK = response(
    "The task ended during the wait, successfully or not.",
    TASK,
    {"completed": {"id": TASK_ID, "status": "completed", "result": RESULT, "worker": "gpu0@host"}},
)
SUBMIT_RESPONSES: Responses = {
    200: _TASK,
    202: {
        **response(
            "Accepted; the task will end with a result or an error.", _ACCEPTED, {"id": {"task_id": TASK_ID}}
        ),
        "headers": {"Location": {"description": "URL of its result.", "schema": {"type": "string"}}},
    },
    400: error_response(
        "Not valid JSON, or not a valid form.",
        "malformed_json",
        "the body is not JSON: unexpected character at line 1, column 1",
    ),
    404: UNKNOWN_MODEL,
    408: error_response(
        "The body stalled; the connection is closed.",
        "slow_body",
        "the body stalled: less than 64 KiB arrived within 10 s, or 1 s while others wait; 65536 bytes "
        "had arrived",
        "body",
    ),
    413: error_response(
        "Too large.",
        "payload_too_large",
        "the body is larger than 33570816 bytes; queue.max_payload_bytes is ...",
    ),
    415: error_response(
        "The compression is not supported.",
        "unsupported_encoding",
        "'br' is not supported; send the body uncompressed, or as gzip or deflate",
        "Content-Encoding",
    ),
    422: error_response("Invalid field.", "bad_input", "must be an integer from 0 to 9, got 11", "priority"),
    429: FULL,
    503: AWAY,
}
PUT_RESPONSES: Responses = {
    **SUBMIT_RESPONSES,
    202: response("Accepted, or submitted before.", TASK, {"queued": {"id": "my-1", "status": "queued"}}),
    409: error_response(
        "The id is in use for a different request.",
        "task_exists",
        "stands for another request already; take another id",
        "task_id",
    ),
}
RESULT_RESPONSES: Responses = {
    200: response(
        "The state of the task.",
        STATUS,
        {
            "completed": {
                "task_id": TASK_ID,
                "status": "completed",
                "result": RESULT,
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
    404: NOT_FOUND,
    410: GONE,
    422: BAD_WAIT,
    503: AWAY,
}
CANCEL_RESPONSES: Responses = {
    200: response(
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
    404: NOT_FOUND,
    410: GONE,
    422: error_response(
        "Invalid task id.", "bad_input", "must be a text of 1 to 200 characters, got ...", "task_id"
    ),
    429: FULL,
    503: AWAY,
    "default": {"description": "Any other error.", "content": {"application/json": {"schema": ERROR}}},
}
