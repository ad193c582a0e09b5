# SPDX-License-Identifier: Apache-2.0
"""Celery's task message, as kombu's Redis transport puts it into a list: its field names, and how to read it.

Source: https://docs.celeryq.dev/en/stable/internals/protocol.html. Messages of all Celery producers are read:
protocol 1 and 2, kombu's own JSON types, and what producers in other languages write. Our own messages are
written by ``submission``.
"""

from __future__ import annotations

import math
import zlib
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeGuard

import orjson

from gpuinfer.errors import InputError, PayloadTooLarge
from gpuinfer.queue import arrays, bodies, json_types
from gpuinfer.queue.bodies import load_head, loads, move
from gpuinfer.queue.keys import REPLY_PREFIX
from gpuinfer.settings import QueueSettings

PREDICT = "gpuinfer.predict"
BATCH_PREDICT = "gpuinfer.batch_predict"
#: Task -> its default queue.
ROUTES = {PREDICT: "realtime", BATCH_PREDICT: "batch"}
#: Prefix of the names of Celery's own tasks: celery.map, celery.chord_unlock, celery.backend_cleanup.
BUILT_IN_PREFIX = "celery."

#: Default maximum size of a decompressed body.
MAX_BODY_BYTES = 64 * 1024 * 1024
#: A larger message is not read: its body should be stored beside the list.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
#: Header: how many bytes of inputs are stored beside the list.
BESIDE = "gpuinfer_body"
#: Header: when it was submitted, in seconds since the epoch by the submitter's clock.
SENT = "gpuinfer_sent"
#: Header: the caller's own names and texts (``Options.metadata``).
METADATA = "gpuinfer_metadata"
#: Header: the caller's trace context; OpenTelemetry's instrumentation of Celery uses the same one.
TRACEPARENT = "traceparent"
#: Header: the hash of its idempotency key.
KEY = "gpuinfer_key"
#: Characters of a traceparent; a later version of the standard may have more than today's 55.
_MOST_TRACEPARENT = 200
#: The fields of a message that say what follows its task.
_CANVAS = ("chain", "chord", "callbacks", "errbacks")
#: The charsets that JSON may declare.
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")


class Undecodable(ValueError):
    """Raised when a message is not a Celery task message in JSON. Carries the id, if that could be read."""

    def __init__(self, reason: str, task_id: str | None = None) -> None:
        super().__init__(reason)
        self.task_id = task_id


def end_of_state(
    expires_at: float | None, metadata: Mapping[str, Any] | None, traceparent: str, sent: bytes
) -> bytes:
    """Return the end of a waiting task's state, that is, all that comes after its priority.

    ``sent``: when it was submitted, in seconds since the epoch; empty: not known.
    """
    about = b""
    if expires_at is not None:
        about += b',"expires":%b' % orjson.dumps(float(expires_at))
    if metadata:
        about += b',"metadata":%b' % orjson.dumps(metadata)
    if traceparent:
        about += b',"traceparent":%b' % orjson.dumps(traceparent)
    return b'%b},"sent_at":%b}' % (about, sent) if sent else b"%b}}" % about


@dataclass(slots=True)
class Envelope:
    """A message whose body has not been read yet."""

    raw: dict[str, Any]
    headers: dict[str, Any]
    properties: dict[str, Any]
    task: str
    id: str
    #: Deliveries before this one; ``deaths``: how many of them ended in the worker's death.
    deliveries: int
    deaths: int
    #: Bytes of its arguments as decompressed text; 0 before they are read.
    size: int = 0
    #: The body if it was opened already, as in protocol 1, where it contains the task's name and id.
    opened: Any = None
    #: What follows its end: ``chain``, ``chord``, ``callbacks``, ``errbacks``; empty until the body is read.
    embed: dict[str, Any] = field(default_factory=dict)

    @property
    def reply_to(self) -> str:
        """Return the reply channel, if the message is from one of our clients; otherwise empty."""
        return _reply_to(self.properties)

    @property
    def sent_at(self) -> float | None:
        """Return when it was submitted, in seconds since the epoch; None unless one of our clients did."""
        at = self.headers.get(SENT)
        return at if type(at) is float else None

    @property
    def metadata(self) -> dict[str, Any] | None:
        """Return the caller's own names and texts; None if there are none."""
        found = self.headers.get(METADATA)
        return found if isinstance(found, dict) and found else None

    @property
    def traceparent(self) -> str:
        """Return the caller's trace context; empty if there is none."""
        found = self.headers.get(TRACEPARENT)
        return found if isinstance(found, str) and len(found) <= _MOST_TRACEPARENT else ""

    @property
    def told(self) -> bytes:
        """Return the end of its state (``end_of_state``) for when it is put back and waits again."""
        try:
            expires_at = moment_of(self.headers, "expires")
        except InputError:
            expires_at = None
        sent = b"" if self.sent_at is None else b"%.3f" % self.sent_at
        return end_of_state(expires_at, self.metadata, self.traceparent, sent)

    @property
    def beside(self) -> int:
        """Return how many bytes of its inputs are stored beside the list; 0: none."""
        size = self.headers.get(BESIDE)
        return size if type(size) is int and size > 0 else 0

    def unpack(self, body: bytes, *, many: bool) -> Any:
        """Return the inputs that were stored beside the list. ``many``: those of ``batch_predict``.

        Raises Undecodable, and PayloadTooLarge for JSON of too many values.
        """
        try:
            return arrays.unpack(body, load_head, many=many)
        except (ValueError, TypeError, LookupError) as exc:
            reason = f"the body stored beside the list is not one of gpuinfer: {type(exc).__name__}"
            raise Undecodable(reason, self.id) from None

    def body(self, max_bytes: int = MAX_BODY_BYTES) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """Return (args, kwargs, embed). In args and kwargs, kombu's JSON types are replaced by plain values.

        Raises Undecodable, and PayloadTooLarge for a body that decompresses to more than ``max_bytes``.
        """
        try:
            body = self.opened
            if body is None:
                body, self.size = bodies.open_body(self.raw, self.headers, self.properties, max_bytes)
            if isinstance(body, dict):
                args, kwargs, embed = body.get("args"), body.get("kwargs"), body
                move(body, self.headers)
            else:
                args, kwargs, embed = body if len(body) == 3 else (*body, None)
        except (ValueError, TypeError, zlib.error, RecursionError) as exc:
            raise Undecodable(f"the body is not a task's arguments: {exc}", self.id) from None
        # For no arguments, PHP and others write null, or [] for kwargs.
        args, kwargs = [] if args is None else args, kwargs or {}
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise Undecodable("the body is not [args, kwargs, embed]", self.id)
        embed = embed if isinstance(embed, dict) else {}
        self.keep(embed)
        return args, kwargs, embed

    def keep(self, embed: dict[str, Any] | None) -> None:
        """Keep what follows the task's end, if anything does."""
        if not embed:
            return
        get = embed.get  # no loop: this runs for every task
        if get("chain") or get("chord") or get("callbacks") or get("errbacks"):
            self.embed = {name: get(name) for name in _CANVAS}

    def forget(self) -> None:
        """Drop the message's text: Redis keeps it while the task is in flight."""
        self.raw, self.opened = {}, None


def _reply_to(properties: dict[str, Any]) -> str:
    channel = properties.get("reply_to")
    return channel if isinstance(channel, str) and channel.startswith(REPLY_PREFIX) else ""


def decode(payload: bytes) -> Envelope:
    """Read a list entry. Raises Undecodable with the reason why the task can never run."""
    return _envelope(*_parts(payload))


def peek(payload: bytes) -> Envelope | None:
    """Read a list entry as ``decode`` does; None if its body would have to be decompressed for that."""
    raw, headers, properties = _parts(payload)
    if "task" not in headers and headers.get("compression"):
        return None
    return _envelope(raw, headers, properties)


def peek_at_end(payload: bytes) -> Envelope | None:
    """Read a list entry and what follows the task's end, without parsing the arguments before it.

    None if nothing follows, or if that is unknown, as in protocol 1 and in a compressed body.
    """
    try:
        raw, headers, properties = _parts(payload)
        if "task" not in headers or headers.get("compression"):
            return None
        envelope = _envelope(raw, headers, properties)
        text: Any = raw.get("body")
        text = b64decode(text) if properties.get("body_encoding") == "base64" else text.encode()
        at = text.rfind(b'{"callbacks"')  # as Celery's producers begin it
        embed = orjson.loads(text[at:].rstrip().removesuffix(b"]")) if at >= 0 else None
    except (ValueError, TypeError, AttributeError):
        return None
    envelope.keep(embed)
    return envelope if envelope.embed else None


def identify(payload: bytes) -> tuple[str | None, str]:
    """Return a task's id, or None, and its client's reply channel, or ''.

    Never opens the body: reading it may be what crashed earlier processes.
    """
    try:
        _, headers, properties = _parts(payload)
    except Undecodable:
        return None, ""
    task_id = headers.get("id")
    task_id = _uuid(task_id) if isinstance(task_id, dict) else task_id
    task_id = task_id or properties.get("correlation_id")
    return task_id if _is_text(task_id) else None, _reply_to(properties)


def _parts(payload: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a message, its headers and its properties. Raises Undecodable."""
    try:
        raw = loads(payload)
    except (ValueError, TypeError) as exc:
        raise Undecodable(f"not JSON: {exc}") from None
    if not isinstance(raw, dict):
        raise Undecodable("not a JSON object")
    headers, properties = raw.get("headers"), raw.get("properties")
    headers = {} if headers is None else headers
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise Undecodable("no headers or properties: not a kombu message")
    return raw, headers, properties


def _envelope(raw: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any]) -> Envelope:
    opened, size = None, 0
    if "task" not in headers:
        opened, size = _first_protocol(raw, headers, properties)
    task, task_id = headers.get("task"), headers.get("id")
    if isinstance(task_id, dict):
        task_id = headers["id"] = _uuid(task_id)
    if not _is_text(task) or not _is_text(task_id):
        raise Undecodable("no task name or id: neither Celery's protocol 1 nor 2")
    _check_type(raw.get("content-type"), task_id)
    if "gpuinfer" not in raw:
        return Envelope(raw, headers, properties, task, task_id, 0, 0, size, opened)
    counts = raw["gpuinfer"]
    if not isinstance(counts, list) or len(counts) != 2 or not all(type(count) is int for count in counts):
        raise Undecodable("its counts of deliveries and deaths are not two integers", task_id)
    return Envelope(raw, headers, properties, task, task_id, counts[0], counts[1], size, opened)


def _first_protocol(
    raw: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any]
) -> tuple[Any, int]:
    """Open a body of protocol 1, and copy the task's fields into ``headers``. Raises Undecodable."""
    task_id = properties.get("correlation_id")  # Celery's producers write the id there, too
    task_id = task_id if _is_text(task_id) else None
    _check_type(raw.get("content-type"), task_id)
    try:
        body, size = bodies.open_body(raw, headers, properties, MAX_BODY_BYTES)
    except (ValueError, TypeError, zlib.error, RecursionError, PayloadTooLarge) as exc:
        raise Undecodable(f"no task in its headers, and its body cannot be read: {exc}", task_id) from None
    if not isinstance(body, dict):
        raise Undecodable("no task name or id: neither Celery's protocol 1 nor 2", task_id)
    move(body, headers)
    return body, size


def _uuid(task_id: dict[str, Any]) -> Any:
    """Return an id that a producer wrote as a UUID object; None if it is not one."""
    try:
        return json_types.plain(task_id)
    except (ValueError, RecursionError):
        return None


def _check_type(content_type: object, task_id: str | None) -> None:
    """Raise Undecodable for anything but JSON in UTF-8."""
    if content_type == "application/json":
        return
    kind, *parameters = str(content_type).lower().split(";")
    named = [text.partition("=")[2].strip().strip('"') for text in parameters if "charset" in text]
    if kind.strip() != "application/json" or any(charset not in _CHARSETS for charset in named):
        reason = f"content type {content_type!r:.80}; only application/json in UTF-8 is read"
        raise Undecodable(reason, task_id)


def tasks_by_name(settings: QueueSettings) -> dict[str, str]:
    """Return name -> our task, for the tasks' own names and their aliases."""
    aliases = dict.fromkeys(settings.predict_aliases, PREDICT)
    aliases |= dict.fromkeys(settings.batch_predict_aliases, BATCH_PREDICT)
    return aliases | {PREDICT: PREDICT, BATCH_PREDICT: BATCH_PREDICT}


def _is_text(value: object) -> TypeGuard[str]:
    """Tell whether a value is a string that can be encoded: one with a lone surrogate cannot."""
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

    Raises InputError when it is not a time.
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
