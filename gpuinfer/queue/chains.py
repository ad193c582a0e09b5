# SPDX-License-Identifier: Apache-2.0
"""What follows the end of a task: the next task of a chain, callbacks after success, errbacks after failure.

Celery's producers write these into the message (``chain``, ``callbacks``, ``errbacks``). A stock worker sends
them before it acknowledges the task. Here the script that writes the task's end sends them in the same call,
if that call takes the task out of flight: each successor is sent exactly once, even if processes die. The
messages are the same as those of Celery's ``Signature.apply_async`` and ``Task.apply_async``.

Sources: celery/app/trace.py, celery/canvas.py, celery/backends/base.py, celery/app/amqp.py.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from base64 import b64encode
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from gpuinfer.errors import ChainRefused, GpuinferError, TaskRevoked
from gpuinfer.log import get_logger
from gpuinfer.names import MODEL_NAME
from gpuinfer.queue import json_types, keys, results
from gpuinfer.queue.claims import Follow
from gpuinfer.queue.message import ROUTES, Envelope, peek_at_end, tasks_by_name
from gpuinfer.settings import QueueSettings

log = get_logger(__name__)

_ORIGIN = f"{os.getpid()}@{socket.gethostname()}"
_CANCELLED = "the task before it in its chain was cancelled"
#: Maximum nesting of groups and chains.
_DEPTH = 10

Signature = Mapping[str, Any]


class Refused(Exception):
    """Raised for a successor that cannot be sent; the text says why."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The context in which a signature is called."""

    parent: Envelope
    #: JSON put before the signature's own arguments: the parent's result, or the id of the failed parent.
    first: bytes
    #: The caller of the parent's list; a successor of ours waits in the same caller's list.
    caller: str
    #: Options that override the signature's own: those of its group, and the rest of the chain.
    options: Mapping[str, Any]
    depth: int = 0


class Chains:
    """Plans what follows the ends of one worker's tasks."""

    def __init__(self, settings: QueueSettings, worker: str) -> None:
        self._names = tasks_by_name(settings)
        self._default = settings.chain_queue
        self._foreign = settings.foreign_queues
        self._steps = sorted(settings.chain_priority_steps)
        self._worker = worker

    def after(self, envelope: Envelope, end: Any, list_key: str) -> tuple[Follow, ...]:
        """Return what follows ``end``, a result or an error. A successor that cannot be sent is logged."""
        failed = isinstance(end, GpuinferError)
        cause = end if failed else TaskRevoked(_CANCELLED)
        follows = self._on_failure(envelope, cause, list_key)
        return tuple(follows if failed else [*self._on_success(envelope, end, list_key), *follows])

    def skipped(self, envelope: Envelope, list_key: str) -> tuple[Follow, ...]:
        """Return what follows a task that was cancelled before it began, or while it ran."""
        return tuple(self._on_failure(envelope, TaskRevoked(_CANCELLED), list_key))

    def buried(self, payload: bytes, error: GpuinferError, list_key: str) -> tuple[Follow, ...]:
        """Return what follows a dead letter, as far as it can be read without opening the arguments."""
        envelope = peek_at_end(payload)
        return () if envelope is None else tuple(self._on_failure(envelope, error, list_key))

    def _on_success(self, parent: Envelope, result: Any, list_key: str) -> Iterator[Follow]:
        call = _Call(parent, results.dump(result), keys.place_of(list_key).caller, {})
        for callback in _listed(parent.embed.get("callbacks")):
            yield from self._send(callback, call, success=True)
        *rest, following = _listed(parent.embed.get("chain")) or [None]
        if following is not None:
            call = _Call(parent, call.first, call.caller, {"chain": rest})
            yield from self._send(following, call, success=True)

    def _on_failure(self, parent: Envelope, cause: GpuinferError, list_key: str) -> Iterator[Follow]:
        """Call the errbacks with the task's id; end the rest of its chain and chord, which cannot begin."""
        call = _Call(parent, results.dump(parent.id), keys.place_of(list_key).caller, {})
        for errback in _listed(parent.embed.get("errbacks")):
            yield from self._send(errback, call, success=False)
        waiting = [*_listed(parent.embed.get("chain")), *_listed(parent.embed.get("chord"))]
        ends = self._ends(waiting, cause, call.caller)
        if ends:
            yield Follow(success=False, ends=ends)

    def _ends(
        self, signatures: Sequence[Any], error: GpuinferError, caller: str
    ) -> tuple[tuple[str, bytes], ...]:
        ids = [task_id for signature in signatures for task_id in _ids(signature)]
        return tuple(
            (task_id, results.failure(task_id, error, worker=self._worker, caller=caller)) for task_id in ids
        )

    def _send(self, signature: Any, call: _Call, *, success: bool) -> Iterator[Follow]:
        try:
            yield from [*self._follows(signature, call, success=success)]
        except (Refused, ValueError, TypeError, ArithmeticError, OSError, RecursionError) as exc:
            waiting = [signature, *_listed(call.options.get("chain"))]
            ends = self._ends(waiting, ChainRefused(str(exc), "chain"), call.caller)
            refused = [task_id for task_id, _ in ends]
            log.error("chain_refused", task_id=call.parent.id, successors=refused, reason=str(exc))
            yield Follow(success=success, ends=ends)

    def _follows(self, signature: Any, call: _Call, *, success: bool) -> Iterator[Follow]:
        """Yield the messages of a signature. Raises Refused, and any error that malformed values cause."""
        _check(signature)
        if call.depth > _DEPTH:
            raise Refused(f"it is nested more than {_DEPTH} deep")
        kind = signature.get("subtask_type") or signature["task"].removeprefix("celery.")
        if kind in ("group", "chain"):
            tasks = _listed((signature.get("kwargs") or {}).get("tasks"))
            split = self._group if kind == "group" else _first_of
            for part, its_call in split(signature, tasks, call):
                yield from self._follows(part, its_call, success=success)
        elif signature["task"].startswith("celery."):
            raise Refused(
                f"{signature['task']} cannot follow a task of gpuinfer: put a task of your own between them"
            )
        else:
            yield self._message(signature, call, success=success)

    def _group(self, group: Signature, tasks: Sequence[Any], call: _Call) -> Iterator[tuple[Any, _Call]]:
        if call.options.get("chain"):
            raise Refused("a group can be followed only by a chord")
        options = dict(group.get("options") or {})
        group_id = options.pop("task_id", None) or str(uuid.uuid4())
        for index, task in enumerate(tasks):
            own = {**call.options, **options, "group_id": group_id, "group_index": index}
            yield task, _Call(call.parent, call.first, call.caller, own, call.depth + 1)

    def _message(self, signature: Signature, call: _Call, *, success: bool) -> Follow:
        """Return the message of one task, as ``Task.apply_async`` makes it, and its list."""
        name = signature["task"]
        options = {**(signature.get("options") or {}), **call.options}
        task_id = json_types.plain(options.get("task_id")) or str(uuid.uuid4())
        if not _is_text(task_id):
            raise Refused(f"its id must be text, not {task_id!r:.60}")
        args, kwargs = signature.get("args") or [], signature.get("kwargs") or {}
        first = b"" if signature.get("immutable") else call.first
        queue = self._queue(name, options)
        priority = min(max(int(options.get("priority") or 0), 0), 9)
        ours = keys.tier_of(queue) is not None
        model = ""
        if ours:
            model = _model(args, kwargs, 0 if first else 1)
            if call.caller and not keys.place_of(queue).caller:
                queue = f"{queue}{keys.CALLER}{call.caller}"
        else:
            priority_step = self._steps[bisect(self._steps, priority) - 1]  # as kombu does
        message = {
            "body": b64encode(_body(first, args, kwargs, options)).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": _headers(name, task_id, options, call.parent),
            "properties": {
                "correlation_id": task_id,
                "reply_to": options.get("reply_to") or "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
        refused = ChainRefused(f"it could not be put into the queue {queue}", "chain")
        return Follow(
            success=success,
            list_key=keys.list_key(queue, priority if ours else priority_step),
            message=orjson.dumps(message),
            id=task_id,
            ours=ours,
            model=model,
            ends=self._ends([signature, *_listed(options.get("chain"))], refused, call.caller),
        )

    def _queue(self, name: str, options: Mapping[str, Any]) -> str:
        """Return the queue of a successor. Raises Refused if the settings do not allow it."""
        queue = options.get("queue")
        if queue is None and options.get("routing_key") and not options.get("exchange"):
            queue = options["routing_key"]  # the default exchange
        if queue is None and options.get("exchange"):
            raise Refused("it names an exchange but no queue; set queue=")
        if queue is None:
            queue = ROUTES[self._names[name]] if name in self._names else self._default
        if not isinstance(queue, str):
            raise Refused(f"queue must be a name, not {queue!r:.60}")
        if keys.tier_of(queue) is None and queue not in self._foreign:
            allowed = ", ".join(self._foreign)
            raise Refused(f"queue.chain_queue and queue.chain_queues allow {allowed}, but not {queue!r:.80}")
        return queue


def _listed(value: Any) -> list[Any]:
    """Return one or several signatures as a list. Any other value becomes an entry, to be refused later."""
    if value is None or value in ([], {}):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _check(signature: Any) -> None:
    """Raise Refused for a value that is not a signature."""
    if not isinstance(signature, Mapping) or not isinstance(signature.get("task"), str):
        raise Refused("it is not the signature of a task")
    for name, kind in (("args", list), ("kwargs", dict), ("options", dict)):
        if signature.get(name) and not isinstance(signature[name], kind):  # [] for no kwargs is PHP's
            raise Refused(f"{name} of its signature must be a {kind.__name__}")


def _is_text(value: object) -> bool:
    """Tell whether a value is a non-empty string that can be encoded: one with a lone surrogate cannot."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _ids(signature: Any, depth: int = 0) -> Iterator[str]:
    """Yield the ids of a signature's tasks, for whose ends clients may wait."""
    if not isinstance(signature, Mapping) or depth > _DEPTH:
        return
    options, kwargs = signature.get("options"), signature.get("kwargs")
    inner: list[Any] = []
    if isinstance(kwargs, Mapping) and str(signature.get("task")).startswith("celery."):
        inner = [*_listed(kwargs.get("tasks")), *_listed(kwargs.get("header")), *_listed(kwargs.get("body"))]
    if inner:
        for part in inner:
            yield from _ids(part, depth + 1)
    elif isinstance(options, Mapping) and _is_text(options.get("task_id")):
        yield options["task_id"]


def _first_of(chain: Signature, tasks: Sequence[Any], call: _Call) -> Iterator[tuple[Any, _Call]]:
    """Yield the first task of a chain, with the remaining tasks as its ``chain`` option."""
    if not tasks:
        raise Refused("it is an empty chain")
    rest = [*_listed(call.options.get("chain")), *reversed(tasks[1:])]
    above = dict(chain.get("options") or {})
    above.pop("task_id", None)
    options = {**call.options, **above, "chain": rest}
    yield tasks[0], _Call(call.parent, call.first, call.caller, options, call.depth + 1)


def _model(args: Sequence[Any], kwargs: Mapping[str, Any], at: int) -> str:
    """Return the model that a task of ours names; empty: the default model."""
    model = kwargs.get("model") or (args[at] if len(args) > at else None)
    return model if isinstance(model, str) and MODEL_NAME.fullmatch(model) else ""


def _headers(name: str, task_id: str, options: Mapping[str, Any], parent: Envelope) -> dict[str, Any]:
    stamps = options.get("stamped_headers")
    more = options.get("headers")
    return {
        "lang": "py",
        "task": name,
        "id": task_id,
        "shadow": options.get("shadow"),
        "eta": _moment(options.get("eta"), options.get("countdown")),
        "expires": _moment(options.get("expires"), None),
        "group": options.get("group_id"),
        "group_index": options.get("group_index"),
        "retries": options.get("retries") or 0,
        "timelimit": [options.get("time_limit"), options.get("soft_time_limit")],
        "root_id": parent.headers.get("root_id") or parent.id,
        "parent_id": parent.id,
        "argsrepr": f"(<from {parent.id:.200}>, ...)",
        "kwargsrepr": "{...}",
        "origin": _ORIGIN,
        "ignore_result": options.get("ignore_result"),
        "replaced_task_nesting": options.get("replaced_task_nesting") or 0,
        "stamped_headers": stamps,
        "stamps": {stamp: options.get(stamp) for stamp in _listed(stamps)},
        **(more if isinstance(more, dict) else {}),
    }


def _moment(value: Any, seconds: Any) -> str | None:
    """Return a time in ISO 8601, given such a time, or a number of seconds from now."""
    value, seconds = json_types.plain(value), json_types.plain(seconds)
    if isinstance(value, int | float) and value is not True:
        seconds = value
    elif value:
        return str(value)
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat() if seconds else None


def _body(first: bytes, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> bytes:
    """Return ``[args, kwargs, embed]`` as JSON, with ``first`` in front of the arguments."""
    embed = {
        "callbacks": _listed(options.get("link")) or None,
        "errbacks": _listed(options.get("link_error")) or None,
        "chain": options.get("chain") or None,
        "chord": options.get("chord"),
    }
    given = _exact(args)[1:-1]
    return b"[[%b%b%b],%b,%b]" % (
        first,
        b"," if first and given else b"",
        given,
        _exact(kwargs),
        _exact(embed),
    )


def _exact(value: Any) -> bytes:
    """Return JSON for parsed JSON, with NaN kept: orjson would write it as null."""
    text = orjson.dumps(value)
    return json.dumps(value).encode() if b"null" in text else text
