# SPDX-License-Identifier: Apache-2.0
"""A message's body, opened: unpacked up to a size, parsed, with plain values in place of kombu's types."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode
from itertools import chain
from typing import Any

import orjson

from gpuinfer.errors import MalformedJson, PayloadTooLarge
from gpuinfer.queue import json_types

#: JSON of more bytes than the first may hold this many values: each takes up to 90 bytes once it is read.
_FREE_JSON_BYTES, _MAX_JSON_VALUES = 4 * 1024 * 1024, 2_000_000
#: What Celery calls ``compression="gzip"``; kombu's is zlib's format in truth.
_COMPRESSIONS = ("application/x-gzip",)
#: What stands in the body of protocol 1, and in the headers of protocol 2.
_MOVED = ("task", "id", "group", "retries", "eta", "expires", "timelimit", "root_id", "parent_id")


def open_body(
    raw: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any], max_bytes: int
) -> tuple[Any, int]:
    """Return the body as JSON has it, and the bytes of its text.

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
    """Put plain values in place of kombu's types, except in what another task's message is made of."""
    if isinstance(body, dict):
        body.update(
            {name: json_types.plain(body[name]) for name in ("args", "kwargs", *_MOVED) if name in body}
        )
    elif isinstance(body, list):
        body[:2] = json_types.plain(body[:2])


def move(body: dict[str, Any], headers: dict[str, Any]) -> None:
    """Put what protocol 1 has in its body where protocol 2 has it; what the headers say already stands."""
    for name in _MOVED:
        if name in body:
            headers.setdefault(name, body[name])
    if "taskset" in body:
        headers.setdefault("group", body["taskset"])


def _unpack(raw: bytes, compression: object, max_bytes: int) -> bytes:
    """Decompress a body up to a size. Raises ValueError, PayloadTooLarge."""
    if compression not in _COMPRESSIONS:
        raise ValueError(f"compression {compression!r:.40} is not read; {' and '.join(_COMPRESSIONS)} are")
    unpacker = zlib.decompressobj(wbits=47)  # with the header of gzip or of zlib
    text = unpacker.decompress(raw, max_bytes)
    if unpacker.unconsumed_tail:
        raise PayloadTooLarge(f"unpacks to more than {max_bytes} bytes", "inputs")
    return text


def loads(raw: bytes | str) -> Any:
    """Parse JSON; NaN and Infinity, which Python's own writer emits, are let through to validation.

    Raises ValueError or TypeError for whatever else can be wrong.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            return json.loads(raw)
        except RecursionError:
            raise ValueError("nested too deeply") from None


#: How deep lists and objects of a request may be nested.
MAX_DEPTH = 200
_REST = bytes(set(range(256)) - set(b'[]{}"'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_depth(text: bytes, most: int = MAX_DEPTH) -> None:
    """Raises MalformedJson for JSON that is nested deeper than ``most``. It is not parsed."""
    if len(text) <= most:
        return
    marks = text.translate(None, _REST)  # one pass; each count of the whole text would take longer
    separators = sum(map(marks.count, (b"[", b"{")))
    if separators <= most:
        return
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = text.translate(None, _REST)
    quotes = marks.count(b'"')  # a name and a value after each separator, at most
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
    """Raises PayloadTooLarge for a list job of more than ``most`` inputs."""
    if count > most:
        raise PayloadTooLarge(
            f"the job has {count} items; queue.max_items is {most}: send several jobs, or each as a task",
            "inputs",
        )


def load_head(head: bytes) -> Any:
    check_values(head)
    return loads(head)


def check_values(text: bytes) -> None:
    """Raises PayloadTooLarge for long JSON whose many values would take all memory once read."""
    if len(text) > _FREE_JSON_BYTES and sum(map(text.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise PayloadTooLarge(f"holds more than {_MAX_JSON_VALUES} values as JSON; send an array", "inputs")
