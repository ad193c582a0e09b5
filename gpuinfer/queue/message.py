# SPDX-License-Identifier: Apache-2.0
"""Celery's task message, protocol 2, as kombu's Redis transport lays it on the list.

Source: https://docs.celeryq.dev/en/stable/internals/protocol.html. The body is plain JSON text
(``body_encoding`` utf-8), a quarter smaller than kombu's base64. Any Celery producer's message
decodes here too.
"""

from __future__ import annotations

import json
import math
import os
import socket
import uuid
import zlib
from base64 import b64decode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeGuard

import orjson

from gpuinfer.errors import InputError, PayloadTooLarge
from gpuinfer.queue.keys import REPLY_PREFIX

PREDICT = "gpuinfer.predict"
BATCH_PREDICT = "gpuinfer.batch_predict"
#: Where a task goes when the caller does not say.
ROUTES = {PREDICT: "realtime", BATCH_PREDICT: "batch"}

_ORIGIN = f"{os.getpid()}@{socket.gethostname()}"
#: What a compressed body may unpack to, unless told otherwise.
MAX_BODY_BYTES = 64 * 1024 * 1024
#: What Celery calls ``compression="gzip"``; kombu's is zlib's format in truth.
_COMPRESSIONS = ("application/x-gzip",)


class Undecodable(ValueError):
    """Raised when a message is no Celery task message in JSON. Carries what could be read of it."""

    def __init__(self, reason: str, task_id: str | None = None) -> None:
        super().__init__(reason)
        self.task_id = task_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What a caller wants done."""

    task: str
    inputs: Any
    queue: str
    priority: int = 0
    model: str | None = None
    #: Options of the prediction: ``top_k``, ``encoding``.
    options: dict[str, Any] = field(default_factory=dict)
    #: Seconds since the epoch after which the task must not begin.
    expires_at: float | None = None
    soft_time_limit_s: float | None = None
    time_limit_s: float | None = None
    ignore_result: bool = False
    #: Whose sub-list it waits in; empty: the only caller.
    caller: str = ""
    #: The channel on which the client hears of its end; empty: by its id alone.
    reply_to: str = ""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def encode(self) -> bytes:
        """Return the list entry.

        Raises InputError where the inputs are not JSON (an array of numpy, say).
        """
        kwargs: dict[str, Any] = dict(self.options)
        if self.model is not None:
            kwargs["model"] = self.model
        rest = orjson.dumps((kwargs, _EMBED))
        body = b"[[%b],%b" % (_dump_inputs(self.inputs), rest[1:])
        return orjson.dumps(
            {
                "body": body.decode(),
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": self._headers(),
                "properties": {
                    "correlation_id": self.id,
                    "reply_to": self.reply_to,
                    "delivery_mode": 2,
                    "delivery_info": {"exchange": "", "routing_key": self.queue},
                    "priority": self.priority,
                    "body_encoding": "utf-8",
                    "delivery_tag": self.id,
                },
            }
        )

    def _headers(self) -> dict[str, Any]:
        expires = self.expires_at
        return {
            "lang": "py",
            "task": self.task,
            "id": self.id,
            "root_id": self.id,
            "parent_id": None,
            "group": None,
            "retries": 0,
            "eta": None,
            "expires": None if expires is None else datetime.fromtimestamp(expires, UTC).isoformat(),
            "timelimit": [self.time_limit_s, self.soft_time_limit_s],
            "origin": _ORIGIN,
            "ignore_result": self.ignore_result,
        }


def _dump_inputs(inputs: Any) -> bytes:
    """Return inputs as JSON. orjson turns NaN and infinity into null; the worker must see what they were."""
    try:
        text = orjson.dumps(inputs, option=orjson.OPT_SERIALIZE_NUMPY)
        if b"null" in text:
            text = json.dumps(inputs, default=_numpy_as_list, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise InputError(f"must be JSON: {exc}", "inputs") from None
    return text


def _numpy_as_list(value: Any) -> Any:
    if not hasattr(value, "tolist"):
        raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")
    return value.tolist()


_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@dataclass(slots=True)
class Envelope:
    """A message as far as it is read without opening its body."""

    raw: dict[str, Any]
    headers: dict[str, Any]
    properties: dict[str, Any]
    task: str
    id: str
    #: Deliveries before this one, and those among them that ended in the worker's death.
    deliveries: int
    deaths: int
    #: Bytes of its arguments as text, unpacked; 0 before they are read.
    size: int = 0

    @property
    def reply_to(self) -> str:
        """Return the channel on which one of our clients hears of the task's end; empty for others."""
        channel = self.properties.get("reply_to")
        return channel if isinstance(channel, str) and channel.startswith(REPLY_PREFIX) else ""

    def body(self, max_bytes: int = MAX_BODY_BYTES) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """Return (args, kwargs, embed). Raises Undecodable, and PayloadTooLarge for what unpacks to more."""
        raw: Any = self.raw.get("body")
        try:
            if self.properties.get("body_encoding") == "base64":
                raw = b64decode(raw)
            if self.headers.get("compression"):
                raw = _unpack(raw, self.headers["compression"], max_bytes)
            self.size = len(raw)
            args, kwargs, embed = _loads(raw)
        except (ValueError, TypeError, zlib.error) as exc:
            raise Undecodable(f"the body is not a task's arguments: {exc}", self.id) from None
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise Undecodable("the body is not [args, kwargs, embed]", self.id)
        return args, kwargs, embed if isinstance(embed, dict) else {}

    def forget(self) -> None:
        """Drop the text. Redis has it as long as the task is in flight."""
        self.raw = {}


def _unpack(raw: bytes, compression: object, max_bytes: int) -> bytes:
    """Decompress a body up to a size. Raises ValueError, PayloadTooLarge."""
    if compression not in _COMPRESSIONS:
        raise ValueError(f"compression {compression!r:.40} is not read; {' and '.join(_COMPRESSIONS)} are")
    unpacker = zlib.decompressobj(wbits=47)  # with the header of gzip or of zlib
    text = unpacker.decompress(raw, max_bytes)
    if unpacker.unconsumed_tail:
        raise PayloadTooLarge(f"unpacks to more than {max_bytes} bytes", "inputs")
    return text


def _loads(raw: bytes | str) -> Any:
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


def decode(payload: bytes) -> Envelope:
    """Read a list entry. Raises Undecodable saying why it can never run."""
    try:
        raw = _loads(payload)
    except (ValueError, TypeError) as exc:
        raise Undecodable(f"not JSON: {exc}") from None
    if not isinstance(raw, dict):
        raise Undecodable("not a JSON object")
    headers, properties = raw.get("headers"), raw.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise Undecodable("no headers or properties: not a message of kombu")
    task, task_id = headers.get("task"), headers.get("id")
    if not _is_text(task) or not _is_text(task_id):
        raise Undecodable("no task name or id in the headers: not Celery's protocol 2")
    if raw.get("content-type") != "application/json":
        raise Undecodable(f"content type {raw.get('content-type')!r}; only application/json is read", task_id)
    counts = raw.get("gpuinfer", [0, 0])
    if not isinstance(counts, list) or len(counts) != 2 or not all(type(count) is int for count in counts):
        raise Undecodable("its counts of deliveries and deaths are no counts", task_id)
    return Envelope(raw, headers, properties, task, task_id, *counts)


def _is_text(value: object) -> TypeGuard[str]:
    """Tell a string that can be written again: a lone surrogate cannot."""
    if not isinstance(value, str):
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def moment_of(headers: dict[str, Any], name: str) -> float | None:
    """Return what the header ``expires`` or ``eta`` says, in seconds since the epoch, or None.

    Raises InputError when it is no point in time.
    """
    value = headers.get(name)
    if value is None:
        return None
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        raise InputError(f"must be a time in ISO 8601, got {value!r:.60}", name) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
