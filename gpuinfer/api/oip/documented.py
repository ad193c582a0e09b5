# SPDX-License-Identifier: Apache-2.0
"""Documentation for ``/docs`` of the paths below ``/v2``; ``routes`` serves them."""

from __future__ import annotations

from fastapi import APIRouter

from gpuinfer.api.elsewhere import JsonSchema, document

_TEXT: JsonSchema = {"type": "string"}
_SHAPE: JsonSchema = {"type": "array", "items": {"type": "integer"}}
_PARAMETERS: JsonSchema = {"type": "object", "additionalProperties": True}
_ERROR: JsonSchema = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
_METADATA: JsonSchema = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {"name": _TEXT, "datatype": _TEXT, "shape": _SHAPE},
}


def _object(**properties: JsonSchema) -> JsonSchema:
    return {"type": "object", "required": [*properties], "properties": properties}


def _list(items: JsonSchema) -> JsonSchema:
    return {"type": "array", "items": items}


_TENSOR: JsonSchema = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": _TEXT,
        "datatype": {
            "type": "string",
            "description": "BOOL, INT8 to INT64, UINT8 to UINT64, FP16, FP32, FP64, BF16 or BYTES.",
        },
        "shape": _SHAPE,
        "parameters": _PARAMETERS,
        "data": {"type": "array", "items": {}, "description": "Flat or nested; null is NaN."},
    },
}
_REQUEST: JsonSchema = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": _TEXT,
        "parameters": {
            **_PARAMETERS,
            "description": "priority (1 is the most urgent), timeout (in microseconds), queue.",
        },
        "inputs": _list(_TENSOR),
        "outputs": _list(
            {"type": "object", "required": ["name"], "properties": {"name": _TEXT, "parameters": _PARAMETERS}}
        ),
    },
}
_ANSWER: JsonSchema = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {"model_name": _TEXT, "model_version": _TEXT, "id": _TEXT, "outputs": _list(_TENSOR)},
}
_WORDS = {
    400: "The request is invalid.",
    404: "There is no such model or version.",
    413: "Too large.",
    415: "The compression is not supported.",
    429: "The queue is full; see Retry-After.",
    500: "The model failed.",
    501: "Requests cannot choose among versions or unload a model.",
    503: "No worker serves it, or Redis is unavailable; see Retry-After.",
    504: "It did not end in time, and was cancelled.",
}


def _responses(words: str, schema: JsonSchema, *statuses: int) -> dict[int | str, JsonSchema]:
    found: dict[int | str, JsonSchema] = {
        status: {"description": _WORDS[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in statuses
    }
    return {200: {"description": words, "content": {"application/json": {"schema": schema}}}} | found


router = APIRouter(tags=["Open Inference Protocol"])
_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"
_ENTRY = _object(name=_TEXT, version=_TEXT, state=_TEXT, reason=_TEXT)
_BODY: JsonSchema = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _REQUEST},
            "application/octet-stream": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": "JSON of Inference-Header-Content-Length bytes, then the inputs' bytes.",
                }
            },
        },
    }
}
_INFERRED = _responses("The model's outputs.", _ANSWER, 400, 404, 413, 415, 429, 500, 501, 503, 504)
_INFERRED[200]["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
_ABOUT = _object(name=_TEXT, versions=_list(_TEXT), inputs=_list(_METADATA), outputs=_list(_METADATA))
_NOTHING: JsonSchema = {"type": "object"}

for _method, _path, _summary, _answers, _extra in (
    ("GET", "/v2/health/live", "The process is running", _responses("It is.", _NOTHING), None),
    ("GET", "/v2/health/ready", "Requests can be served", _responses("They can.", _NOTHING, 500, 503), None),
    ("GET", "/v2", "The server", _responses("Its name.", _object(name=_TEXT, version=_TEXT)), None),
    *(
        (method, path + rest, summary, answers, extra)
        for path in (_MODEL, _VERSION)
        for method, rest, summary, answers, extra in (
            (
                "GET",
                "",
                "Inputs and outputs of a model",
                _responses("Its tensors.", _ABOUT, 404, 500, 503),
                None,
            ),
            (
                "GET",
                "/ready",
                "A live worker serves it",
                _responses("It is served.", _NOTHING, 404, 500, 503),
                None,
            ),
            ("POST", "/infer", "Run a model and wait for the result", _INFERRED, _BODY),
        )
    ),
    (
        "POST",
        "/v2/repository/index",
        "The models of the fleet",
        _responses("All, or those that are ready.", _list(_ENTRY), 400, 413, 415, 500, 503),
        {"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}},
    ),
    (
        "POST",
        "/v2/repository/models/{model}/load",
        "Loads nothing: 200 if a live worker serves the model",
        _responses("It is served.", _NOTHING, 404, 500, 503),
        None,
    ),
    (
        "POST",
        "/v2/repository/models/{model}/unload",
        "Unloads nothing: 200 if no live worker serves the model",
        _responses("It is not served.", _NOTHING, 404, 500, 501, 503),
        None,
    ),
):
    document(router, _method, _path, _summary, _answers, extra=_extra)
