# SPDX-License-Identifier: Apache-2.0
"""Checks a caller's arguments and builds a task from them, with an id and a reply channel."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Unpack

import orjson

from gpuinfer.client.origin import Origin
from gpuinfer.errors import InputError
from gpuinfer.queue import keys
from gpuinfer.queue.message import BATCH_PREDICT, PREDICT, ROUTES
from gpuinfer.queue.options import MAX_NAME, Options, check
from gpuinfer.queue.quota import Quota
from gpuinfer.queue.submission import Submission

_OWN_ID = re.compile(rf"[A-Za-z0-9_.:-]{{1,{MAX_NAME}}}")


def build(
    inputs: Any,
    *,
    many: bool,
    origin: Origin | None = None,
    default_model: str | None = None,
    clock: Callable[[], float] = time.time,
    task_id: str | None = None,
    caller: str = "",
    quota: Quota | None = None,
    **options: Unpack[Options],
) -> Submission:
    """Check a caller's arguments and return the task. Raises InputError naming the field.

    ``default_model``: the model if the arguments name none; None: the fleet's default. ``task_id``: an id
    chosen by the caller; a repeated request with it makes no second task. ``caller``: the owner of the task;
    ``quota``: the caller's quota.
    """
    if caller and not keys.CALLER_NAME.fullmatch(caller):
        raise InputError(f"must be {keys.CALLER_WORDS}, got {caller!r:.80}", "caller")
    if not options and task_id is None:  # most requests
        return Submission(
            task=BATCH_PREDICT if many else PREDICT,
            inputs=inputs,
            queue=ROUTES[BATCH_PREDICT if many else PREDICT],
            model=default_model,
            reply_to="" if origin is None else origin.channel,
            caller=caller,
            quota=quota,
            id=str(uuid.uuid4()) if origin is None else origin.new_id(),
        )
    check(options)
    key = options.get("idempotency_key") or ""
    if task_id is not None:
        if key:
            raise InputError("the task's id identifies the request; leave the key out", "idempotency_key")
        if not _OWN_ID.fullmatch(task_id):
            raise InputError(
                f"must be 1 to {MAX_NAME} of A to Z, a to z, 0 to 9, '_', '.', ':' and '-'", "task_id"
            )
        key = own_key(task_id)
    task = BATCH_PREDICT if many else PREDICT
    expires_s, countdown_s = options.get("expires_s"), options.get("countdown_s")
    if expires_s is not None and countdown_s is not None and expires_s <= countdown_s:
        raise InputError(f"must be less than expires_s ({expires_s:g}), got {countdown_s:g}", "countdown_s")
    extra: dict[str, Any] = {}
    if (top_k := options.get("top_k")) is not None:
        extra["top_k"] = top_k
    if (encoding := options.get("encoding")) is not None:
        extra["encoding"] = encoding
    return Submission(
        task=task,
        inputs=inputs,
        queue=options.get("queue") or ROUTES[task],
        priority=options.get("priority", 0),
        model=options.get("model") or default_model,
        options=extra,
        expires_at=None if expires_s is None else clock() + expires_s,
        countdown_s=countdown_s,
        soft_time_limit_s=options.get("soft_time_limit_s"),
        time_limit_s=options.get("time_limit_s"),
        ignore_result=options.get("ignore_result", False),
        reply_to="" if origin is None or not (task_id is None or origin.made(task_id)) else origin.channel,
        metadata=options.get("metadata"),
        traceparent=options.get("traceparent") or "",
        asked=_asked(task, options) if key else b"",
        key=key,
        caller=caller,
        quota=quota,
        id=task_id or (str(uuid.uuid4()) if origin is None else origin.new_id()),
    )


def own_key(task_id: str) -> str:
    """Return the idempotency key for a task id chosen by the caller."""
    return f"PUT {task_id}"


def _asked(task: str, options: Options) -> bytes:
    """Return the task's name and options, to compare two requests with one key; None counts as left out."""
    given = {
        name: value
        for name, value in options.items()
        if value is not None and name not in ("idempotency_key", "traceparent")
    }
    return orjson.dumps([task, given], option=orjson.OPT_SORT_KEYS)
