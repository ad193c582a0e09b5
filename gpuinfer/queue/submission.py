# SPDX-License-Identifier: Apache-2.0
"""A task as the caller submits it, and the list entry that it becomes: a message in Celery's protocol 2.

The body is plain JSON text (``body_encoding`` utf-8), a quarter smaller than kombu's base64. Large inputs are
stored beside the list. The names of the headers are in ``message``, which reads them.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from gpuinfer.errors import InputError
from gpuinfer.models.type_words import word
from gpuinfer.queue import arrays
from gpuinfer.queue.bodies import check_values
from gpuinfer.queue.message import (
    BATCH_PREDICT,
    BESIDE,
    KEY,
    MAX_BODY_BYTES,
    METADATA,
    SENT,
    TRACEPARENT,
    end_of_state,
)
from gpuinfer.queue.quota import Quota, Rate

_ORIGIN = f"{os.getpid()}@{socket.gethostname()}"
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Packed(NamedTuple):
    """A task in the form in which it is sent."""

    #: The list entry.
    payload: bytes
    #: The inputs as they are sent, in the list entry or beside the list.
    inputs: bytes
    #: The body to store beside the list; None if all is in the list entry.
    beside: bytes | None = None
    #: The end of its waiting state's JSON, which the script ``submit`` appends.
    told: bytes = b"]}}"

    @property
    def size(self) -> int:
        """Bytes of the list entry and the body."""
        return len(self.payload) + len(self.beside or b"")


class Json(NamedTuple):
    """Inputs that are JSON text already, which is sent unchanged."""

    #: Already checked: one value, in UTF-8, with numbers and a depth that every reader can handle.
    text: bytes
    #: The parsed value.
    value: Any


@dataclass(kw_only=True, slots=True)
class Submission:
    """A task as a caller submits it. Not frozen, which would double its cost; only ``rate`` is set later."""

    task: str
    inputs: Any
    queue: str
    priority: int = 0
    model: str | None = None
    #: Options of the prediction: ``top_k``, ``encoding``.
    options: dict[str, Any] = field(default_factory=dict)
    #: Seconds since the epoch after which the task must not begin.
    expires_at: float | None = None
    #: Seconds until a worker may begin it, by Redis's clock; None: at once.
    countdown_s: float | None = None
    soft_time_limit_s: float | None = None
    time_limit_s: float | None = None
    ignore_result: bool = False
    #: The caller's own names and texts, returned with the task.
    metadata: Mapping[str, str] | None = None
    #: The caller's trace context, in W3C's format; empty: none.
    traceparent: str = ""
    #: The caller, in whose list it waits; empty: none.
    caller: str = ""
    #: The caller's limits; None: no limits.
    quota: Quota | None = None
    #: The state of the caller's rate limit, set when the task is accepted.
    rate: Rate | None = None
    #: The client's reply channel; empty: the result is published only on its own key's channel.
    reply_to: str = ""
    #: The request's options as the caller wrote them, to tell whether two requests are the same. The message
    #: cannot tell: its ``model`` may be the default model of that time.
    asked: bytes = b""
    #: The caller's idempotency key; empty: none.
    key: str = ""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def encode(self) -> bytes:
        """Return the list entry with its whole body in it, of any size, as a plain producer sends it.

        Raises InputError.
        """
        return self.pack(MAX_BODY_BYTES).payload

    def pack(self, most: int = arrays.BESIDE_BYTES) -> Packed:
        """Return the list entry, and the body to store beside the list if the inputs exceed ``most`` bytes.

        Raises InputError if the inputs are neither arrays nor JSON, or if a list job's are not a list;
        PayloadTooLarge for too many values.
        """
        many = self.task == BATCH_PREDICT
        placed: list[arrays.Placed] = []
        if type(self.inputs) is Json:
            text, rest = self.inputs
            if many and type(rest) is not list:
                raise InputError(f"must be a list of inputs, got {word(rest)}", "inputs")
        else:
            rest, placed = arrays.split(self.inputs, many=many)
            text = _dump_inputs(rest)
        kwargs: dict[str, Any] = dict(self.options)
        if self.model is not None:
            kwargs["model"] = self.model
        options = orjson.dumps((kwargs, _EMBED))[1:]
        sent = b"%.3f" % time.time()
        told = self._told(sent)
        size = len(text)
        if placed:
            size += sum(len(raw.data) * 4 // 3 for _, raw in placed)
        if size > most:
            beside = arrays.pack(text, placed)
            body = b"[[],%b" % options
            extra = b',"%b":%d' % (BESIDE.encode(), len(beside))
            return Packed(self._message(body, sent, extra), beside, beside, told)
        if placed:
            text = _dump_inputs(arrays.inline(rest, placed, many=many))
        body = b"[[%b],%b" % (text, options)
        return Packed(self._message(body, sent), text, told=told)

    def _told(self, sent: bytes) -> bytes:
        """Return the end of a waiting task's state, which begins after its ``place``: see submit.lua."""
        about = b',"priority":%d' % self.priority if self.priority else b""
        return b"]%b%b" % (about, end_of_state(self.expires_at, self.metadata, self.traceparent, sent))

    def _message(self, body: bytes, sent: bytes, extra: bytes = b"") -> bytes:
        """Return the list entry. ``sent``: when it is submitted, in seconds since the epoch; ``extra``: more
        headers as JSON, each with a comma before it.
        """
        if self.metadata:  # before the key, which scripts search for near the end
            extra += b',"%b":%b' % (METADATA.encode(), orjson.dumps(self.metadata))
        if self.traceparent:
            extra += b',"%b":"%b"' % (TRACEPARENT.encode(), self.traceparent.encode())
        if self.key:  # so that a script that ends the task can free the key
            extra += b',"%b":"%b"' % (KEY.encode(), self.keyed.encode())
        limits = self.time_limit_s, self.soft_time_limit_s
        a, b, c, d, e, f, g, h = _frame(
            self.task, self.queue, self.priority, self.reply_to, limits, self.ignore_result
        )
        text, task_id = orjson.dumps(body.decode()), orjson.dumps(self.id)
        expires = b"null"
        if self.expires_at is not None:
            expires = orjson.dumps(datetime.fromtimestamp(self.expires_at, UTC).isoformat())
        return b"".join(
            (a, text, b, task_id, c, task_id, d, expires, e, sent, extra, f, task_id, g, task_id, h)
        )

    @property
    def keyed(self) -> str:
        """The hash of caller and key: 32 characters; empty without a key."""
        return keyed(self.caller, self.key) if self.key else ""

    def digest(self, packed: Packed) -> str:
        """Return the hash of the request: 32 characters. ``packed``: the result of ``pack``."""
        asked = blake2b(self.asked, digest_size=16)
        asked.update(packed.inputs)
        return asked.hexdigest()


def keyed(caller: str, key: str) -> str:
    """Return the hash of a caller and its idempotency key: 32 characters."""
    return blake2b(f"{caller}\0{key}".encode(), digest_size=16).hexdigest()


#: Marks the places in a frame that differ for each task.
_GAP = uuid.uuid4().hex


@lru_cache(maxsize=256)
def _frame(
    task: str,
    queue: str,
    priority: int,
    reply_to: str,
    limits: tuple[float | None, float | None],
    ignore_result: bool,
) -> list[bytes]:
    """Return the part of a message that many tasks share, as the pieces between its gaps.

    The gaps are for body, id, id, expiry, time of submission (and other headers), id, id.
    """
    text = orjson.dumps(
        {
            "body": _GAP,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": task,
                "id": _GAP,
                "root_id": _GAP,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "eta": None,
                "expires": _GAP,
                "timelimit": limits,
                "origin": _ORIGIN,
                "ignore_result": ignore_result,
                SENT: _GAP,
            },
            "properties": {
                "correlation_id": _GAP,
                "reply_to": reply_to,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "body_encoding": "utf-8",
                "delivery_tag": _GAP,
            },
        }
    )
    return text.split(f'"{_GAP}"'.encode())


def _dump_inputs(inputs: Any) -> bytes:
    """Return inputs as JSON, with NaN and infinity kept for the worker to see: orjson writes them as null."""
    try:
        text = orjson.dumps(inputs, _as_list, orjson.OPT_SERIALIZE_NUMPY)
        if b"null" in text:
            text = json.dumps(inputs, default=_as_list, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise InputError(f"must be JSON, or arrays: {exc}", "inputs") from None
    check_values(text)
    return text


def _as_list(value: Any) -> Any:
    """Return an array that is nested among other values as a list, for JSON."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")
    return value.tolist()
