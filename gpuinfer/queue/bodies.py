# SPDX-License-Identifier: Apache-2.0
"""Opening a message's body: decompress it up to a size, parse it, replace kombu's types by plain values."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode
from itertools import chain
from typing import Any

import orjson

from gpuinfer.errors import MalformedJson, PayloadTooLarge
from gpuinfer.queue import json_types

#: JSON longer than the first may contain at most this many values, as each takes up to 90 bytes once parsed.
_FREE_JSON_BYTES, _MAX_JSON_VALUES = 4 * 1024 * 1024, 2_000_000
#: Celery's ``compression="gzip"``; kombu actually writes zlib's format under this name.
_COMPRESSIONS = ("application/x-gzip",)
#: Fields that protocol 1 has in the body, and protocol 2 in the headers.
_MOVED = ("task", "id", "group", "retries", "eta", "expires", "timelimit", "root_id", "parent_id")


def open_body(
    raw: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any], max_bytes: int
) -> tuple[Any, int]:
    """Return the parsed body, and the length of its text.

    Raises ValueError, TypeError, zlib.error, RecursionError, PayloadTooLarge.
    """
    text: Any = raw.get("body")
    if properties.get("body_encoding") == "base64":
        text = b64decode(text)
    if headers.get("compression"):
        text = _unpack(text, headers["compression"], max_bytes)
    body = loads(text)
    if (b"__type__" if isinstance(text, bytes) else "__type__") in text:
        _simplify(body)
    return body, len(text)


def _simplify(body: Any) -> None:
    """Replace kombu's types by plain values, except where other tasks' messages are made of them (canvas)."""
    if isinstance(body, dict):
        body.update(
            {name: json_types.plain(body[name]) for name in ("args", "kwargs", *_MOVED) if name in body}
        )
    elif isinstance(body, list):
        body[:2] = json_types.plain(body[:2])


def move(body: dict[str, Any], headers: dict[str, Any]) -> None:
    """Copy the fields that protocol 1 has in its body into the headers, unless the headers have them."""
    for name in _MOVED:
        if name in body:
            headers.setdefault(name, body[name])
    if "taskset" in body:
        headers.setdefault("group", body["taskset"])


def _unpack(raw: bytes, compression: object, max_bytes: int) -> bytes:
    """Decompress a body up to a size. Raises ValueError, PayloadTooLarge."""
    if compression not in _COMPRESSIONS:
        raise ValueError(
            f"unsupported compression {compression!r:.40}; supported: {', '.join(_COMPRESSIONS)}"
        )
    unpacker = zlib.decompressobj(wbits=47)  # with the header of gzip or of zlib
    text = unpacker.decompress(raw, max_bytes)
    if unpacker.unconsumed_tail:
        raise PayloadTooLarge(f"unpacks to more than {max_bytes} bytes", "inputs")
    return text


def loads(raw: bytes | str) -> Any:
    """Parse JSON. NaN and Infinity, which Python's json writes, are accepted here and validated later.

    Raises ValueError or TypeError for anything else that is not JSON.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            return json.loads(raw)
        except RecursionError:
            raise ValueError("nested too deeply") from None


#: Maximum nesting of lists and objects in a request.
MAX_DEPTH = 200
_REST = bytes(set(range(256)) - set(b'[]{}"'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_depth(text: bytes, most: int = MAX_DEPTH) -> None:
    """Raise MalformedJson for JSON that is nested deeper than ``most``, without parsing it."""
    if len(text) <= most:
        return
    marks = text.translate(None, _REST)  # one pass; counting in the whole text is slower
    separators = sum(map(marks.count, (b"[", b"{")))
    if separators <= most:
        return
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = text.translate(None, _REST)
    quotes = marks.count(b'"')  # at most a name and a value follow each separator
    if quotes > 4 * (separators + 1) and quotes > 4 * (separators + text.count(b",") + 1):
        raise MalformedJson(
            "the body is not JSON: it has more quotation marks than places for strings", "body"
        )
    outside = marks.split(b'"')[::2]
    depth = 0
    for bracket in chain.from_iterable(outside):
        depth += _STEP[bracket]
        if depth > most:
            raise MalformedJson(f"the body is nested deeper than {most} lists and objects", "body")


def check_items(count: int, most: int) -> None:
    """Raise PayloadTooLarge for a list job of more than ``most`` inputs."""
    if count > most:
        raise PayloadTooLarge(
            f"the job has {count} items; queue.max_items is {most}: send several jobs, or each as a task",
            "inputs",
        )


def load_head(head: bytes) -> Any:
    check_values(head)
    return loads(head)


def check_values(text: bytes) -> None:
    """Raise PayloadTooLarge for long JSON whose values would exhaust memory when parsed."""
    if len(text) > _FREE_JSON_BYTES and sum(map(text.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise PayloadTooLarge(f"holds more than {_MAX_JSON_VALUES} values as JSON; send an array", "inputs")
