# SPDX-License-Identifier: Apache-2.0
"""What ``/docs`` shows of the fleet: models, queues, workers, usage, metrics and health."""

from __future__ import annotations

from gpuinfer.api.schemas import (
    AWAY,
    RETRY_AFTER,
    UNKNOWN_MODEL,
    JsonSchema,
    Responses,
    error_response,
    response,
)
from gpuinfer.settings import QUEUES

_COUNT: JsonSchema = {"type": "integer", "minimum": 0}
MODEL: JsonSchema = {
    "type": "object",
    "required": [
        *("name", "default", "serving", "queues", "workers", "missing", "waiting", "paused", "last_seen"),
    ],
    "properties": {
        "name": {"type": "string"},
        "default": {"type": "boolean", "description": "true: used for requests that name no model."},
        "serving": {"type": "boolean", "description": "true: a live worker serves it."},
        "queues": {
            "type": "array",
            "items": {"enum": list(QUEUES)},
            "description": "Queues that are served for it now.",
        },
        "workers": {**_COUNT, "description": "Live workers that serve it."},
        "missing": {
            "type": "object",
            "description": "Worker that failed to load it -> reason.",
            "additionalProperties": {"type": "string"},
        },
        "waiting": {
            "type": "object",
            "description": "Queue -> waiting tasks for it.",
            "properties": dict.fromkeys(QUEUES, _COUNT),
        },
        "paused": {
            "type": "array",
            "items": {"enum": list(QUEUES)},
            "description": "Queues that are paused for it.",
        },
        "last_seen": {
            "type": ["string", "null"],
            "format": "date-time",
            "description": "When a worker that can serve it was last seen; null: never, although tasks wait.",
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
MODELS_RESPONSES: Responses = {
    200: response(
        "All known models by name, and any other model with waiting tasks.",
        {"type": "array", "items": MODEL},
        {"one serves, one waits for a worker": [_SERVED, _WAITS]},
    ),
    503: AWAY,
}
MODEL_RESPONSES: Responses = {
    200: response("The model, as in the list.", MODEL, {"served": _SERVED, "waits for a worker": _WAITS}),
    404: UNKNOWN_MODEL,
    503: AWAY,
}
_ACCOUNT: JsonSchema = {
    "type": "object",
    "required": ["requests", "errors", "refused", "bytes_in", "bytes_out", "device_s"],
    "properties": {
        "key": {"type": "string", "description": "Present unless summed by model."},
        "model": {"type": "string", "description": "Present unless summed by key."},
        "requests": _COUNT,
        "errors": {**_COUNT, "description": "Requests that failed or were invalid."},
        "refused": {**_COUNT, "description": "Requests refused for lack of capacity: 429 and 503."},
        "bytes_in": _COUNT,
        "bytes_out": _COUNT,
        "device_s": {"type": "number", "description": "A batch's time, divided among its inputs."},
    },
}
USAGE_RESPONSES: Responses = {
    200: response(
        "Sorted by device time, highest first.",
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
    422: error_response("A bad parameter.", "bad_input", "must be key or model, got 'user'", "by"),
    503: AWAY,
}
METRICS_RESPONSES: Responses = {
    200: {
        "description": "Prometheus's text format, or OpenMetrics if `Accept` asks for it.",
        "content": {
            name: {"schema": {"type": "string"}} for name in ("text/plain", "application/openmetrics-text")
        },
    },
    404: error_response(
        "They are served on another address.",
        "not_found",
        "metrics are served on another address, because metrics.listen is set",
    ),
}
_LIVE: JsonSchema = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["ok"]}},
}
LIVE_RESPONSES: Responses = {200: response("The process runs.", _LIVE, {"ok": {"status": "ok"}})}
_READY: JsonSchema = {
    "type": "object",
    "required": ["status", "workers", "startable"],
    "properties": {
        "status": {"enum": ["ok", "starting"]},
        "workers": {**_COUNT, "description": "Live workers that serve it."},
        "startable": {**_COUNT, "description": "Instances that are starting, or that a watcher may start."},
        "model": {"type": "string", "description": "Present if a model was given."},
    },
}
READY_RESPONSES: Responses = {
    200: response(
        "A worker serves (`ok`), or can be started (`starting`).",
        _READY,
        {
            "ok": {"status": "ok", "workers": 2, "startable": 6},
            "starting": {"status": "starting", "workers": 0, "startable": 8, "model": "digits"},
        },
    ),
    404: UNKNOWN_MODEL,
    503: RETRY_AFTER
    | error_response(
        "No worker serves and none can be started, or Redis is unavailable; see Retry-After.",
        "not_ready",
        "no live worker serves any model, and no live watcher may start one (gpu0@host1: masked)",
    ),
}
