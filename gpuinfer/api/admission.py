# SPDX-License-Identifier: Apache-2.0
"""Converts a request's body to the task to submit. Pure functions.

A JSON list is the inputs; an object holds them under "inputs", with the options of
``gpuinfer.client.Options``: ``{"inputs": ..., "model": ..., ...}``.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple, cast

import orjson

from gpuinfer.api.slicing import inputs_text
from gpuinfer.client import Options
from gpuinfer.errors import InputError, MalformedJson
from gpuinfer.queue.bodies import check_depth, check_values
from gpuinfer.queue.options import OPTIONS
from gpuinfer.queue.submission import Json

#: Fields of an object body, in the order that errors list them.
FIELDS: tuple[str, ...] = ("inputs", *OPTIONS)
#: Keys of a file or array in base64, which may be the whole body.
_ENCODED = frozenset({"b64", "name", "dtype", "shape"})
#: Bytes allowed for braces, options and white space, beyond queue.max_payload_bytes.
SLACK_BYTES = 16 * 1024
_BOM = b"\xef\xbb\xbf"
#: An integer of more characters has more than 64 bits.
_MOST_DIGITS = 20
#: Not valid JSON, but Python's json module writes them. The worker decides whether to refuse them.
_NON_FINITE = re.compile(rb"\bNaN\b|\bInfinity\b")


class Admission(NamedTuple):
    """One parsed request."""

    inputs: Any
    options: Options


def body_limit(max_payload_bytes: int) -> int:
    """Return the maximum bytes of a request's body."""
    return max_payload_bytes + SLACK_BYTES


def parse_json(body: bytes) -> Any:
    """Parse a body. NaN and infinity are accepted.

    Raises MalformedJson with line and column, PayloadTooLarge for millions of values.
    """
    body = body.removeprefix(_BOM)
    if not body.strip():
        raise MalformedJson("the body is empty; it must be a JSON list or an object with inputs", "body")
    check_values(body)
    check_depth(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        if _NON_FINITE.search(body):
            return _parse_python_json(body)
        raise MalformedJson(_place(exc), "body") from None


def _parse_python_json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_int=_integer, parse_float=_finite)
    except json.JSONDecodeError as exc:
        raise MalformedJson(_place(exc), "body") from None
    except (ValueError, RecursionError) as exc:
        raise MalformedJson(f"the body is not JSON: {exc}", "body") from None


def _integer(text: str) -> int | float:
    """Return an integer of at most 64 bits; a larger one as a double, like orjson."""
    number = int(text) if len(text) <= _MOST_DIGITS else 2**64
    return number if -(2**63) <= number < 2**64 else _finite(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"a number of {len(text)} characters ({text[:20]}...) is too large for a double")
    return number


def _place(exc: json.JSONDecodeError) -> str:
    return f"the body is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}"


def admit(body: bytes, *, header_key: str | None = None) -> Admission:
    """Parse a request. ``header_key``: its ``Idempotency-Key`` header.

    The client checks the options. Raises MalformedJson, InputError.
    """
    value = parse_json(body)
    names = list(value) if isinstance(value, dict) else None
    asked = admit_value(value, header_key=header_key)
    if asked.inputs is value:
        names = None
    if asked.options.get("idempotency_key"):  # compare requests by content, not by white space
        return asked
    text = inputs_text(body, names)
    return asked if text is None else asked._replace(inputs=Json(text, asked.inputs))


def admit_value(value: Any, *, header_key: str | None = None) -> Admission:
    """Like ``admit``, for a parsed body, which it modifies. Raises InputError."""
    if isinstance(value, list):
        return Admission(inputs=value, options=with_key({}, header_key))
    if not isinstance(value, dict):
        raise InputError(f"must be a JSON list or an object with inputs, got {_word(value)}", "body")
    if "b64" in value and _ENCODED.issuperset(value):
        return Admission(inputs=value, options=with_key({}, header_key))
    unknown = [name for name in value if name not in FIELDS]
    if unknown:
        raise InputError(f"unknown field; known: {', '.join(FIELDS)}", unknown[0][:80])
    if "inputs" not in value:
        raise InputError('is missing; send {"inputs": ...} or only the list', "inputs")
    inputs = value.pop("inputs")
    given = {name: option for name, option in value.items() if option is not None}
    return Admission(inputs=inputs, options=with_key(cast(Options, given), header_key))


def _word(value: object) -> str:
    return {str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def with_key(options: Options, header_key: str | None) -> Options:
    """Add the ``Idempotency-Key`` header to the options. Raises InputError if the body has a different
    key."""
    if not header_key:
        return options
    if options.get("idempotency_key", header_key) != header_key:
        raise InputError("differs from the Idempotency-Key header; give only one of them", "idempotency_key")
    return {**options, "idempotency_key": header_key}
