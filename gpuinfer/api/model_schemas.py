# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of models' inputs, for ``/openapi.json`` and ``/docs``."""

from __future__ import annotations

from typing import Any

from gpuinfer.models.signature import Input, Signature

JsonSchema = dict[str, Any]

_NUMBERS: dict[str, JsonSchema] = {"bool": {"type": "boolean"}, "int": {"type": "integer"}}
_BASE64: JsonSchema = {"type": "string", "contentEncoding": "base64"}
_FILES = {"image": "An image file", "audio": "A sound file", "bytes": "Bytes", "file": "A file"}


def inputs_schema(signature: Signature) -> JsonSchema:
    """Return the JSON schema of a request's ``inputs`` for this model."""
    if not signature.inputs:
        return {"description": "Any JSON value: the model's code does not declare its inputs."}
    only = signature.only
    if only is not None and not signature.named:
        return _input(only)
    return {
        "type": "object",
        "required": [one.name for one in signature.inputs],
        "properties": {one.name: _input(one) for one in signature.inputs},
        "additionalProperties": False,
    }


def _input(one: Input) -> JsonSchema:
    if one.kind == "tensor":
        ways = [_nested(one), _encoded(one)]
        if one.file is not None:
            ways.append(_file(_FILES[one.file]))
        return {"anyOf": ways}
    if one.kind in ("json", "text"):
        default: JsonSchema = {"type": "string"} if one.kind == "text" else {"description": "Any JSON value."}
        return dict(one.schema) if one.schema is not None else default
    return _file(_FILES[one.kind])


def _nested(one: Input) -> JsonSchema:
    """Return the schema of nested lists of numbers of a tensor's shape."""
    kind = (one.dtype or "float").removeprefix("u")
    number = next(
        (schema for start, schema in _NUMBERS.items() if kind.startswith(start)), {"type": "number"}
    )
    if one.shape is None:
        return {"description": "Nested lists of numbers, of any shape."}
    schema: JsonSchema = number
    for length in reversed(one.shape):
        schema = {"type": "array", "items": schema}
        if length >= 0:
            schema |= {"minItems": length, "maxItems": length}
    return {**schema, "description": f"Nested lists, shape {list(one.shape)}, as {one.dtype or 'any dtype'}."}


def _encoded(one: Input) -> JsonSchema:
    dtype: JsonSchema = (
        {"type": "string"} if one.dtype is None else {"type": "string", "examples": [one.dtype]}
    )
    return {
        "type": "object",
        "description": "The array's bytes: little-endian, row by row.",
        "required": ["b64", "dtype", "shape"],
        "properties": {
            "b64": _BASE64,
            "dtype": dtype,
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        },
        "additionalProperties": False,
    }


def _file(words: str) -> JsonSchema:
    return {
        "type": "object",
        "description": f"{words}, in base64. To send it unencoded, use its own Content-Type or a form.",
        "required": ["b64"],
        "properties": {"b64": _BASE64, "name": {"type": "string"}},
    }
