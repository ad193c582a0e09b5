# SPDX-License-Identifier: Apache-2.0
"""Revokes all waiting tasks of a queue.

Each call removes a few tasks and writes their ends atomically, so an interrupted purge leaves each task
either waiting or revoked, and the next purge continues. Claimed tasks are not affected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis

from gpuinfer.errors import TaskRevoked, UsageError
from gpuinfer.queue import keys, results
from gpuinfer.queue.chains import Chains
from gpuinfer.queue.claims import Final, following, label
from gpuinfer.queue.depth import Lane
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.message import Undecodable, identify, peek
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QUEUES, QueueSettings

#: Maximum tasks and bytes of one call, so that it blocks Redis for less than 10 ms.
CALL_TASKS, CALL_BYTES = 250, 512 * 1024


@dataclass(frozen=True, slots=True)
class Line:
    """The waiting tasks of one list, or those of a list that wait for their ETA."""

    list_key: str
    lane: Lane
    kind: Literal["list", "later"]
    tasks: int

    @property
    def key(self) -> str:
        """Return the key of the list or sorted set."""
        return self.list_key if self.kind == "list" else keys.later(self.list_key)


def check(queue: str) -> str:
    """Return a queue's name as given: ``tier`` or ``tier.model``. Raises UsageError."""
    tier, dot, model = queue.partition(".")
    if tier not in QUEUES or bool(dot) != bool(model):
        named = ", ".join(QUEUES)
        raise UsageError(
            f"must be one of {named}, optionally with a model, such as batch.resnet, got {queue!r}"
        )
    return queue


def lines(client: redis.Redis, queue: str | None = None) -> list[Line]:
    """Return the waiting tasks of a queue (``tier``: of all its models; ``tier.model``), or of all queues.

    Raises redis-py's errors.
    """
    default, _, lists, _, sets, *_ = bind(client, "depth")(args=[0])
    found = [
        *_lines("list", lists[::2], lists[1::2], default),
        *_lines("later", sets[::3], sets[1::3], default),
    ]
    return [one for one in found if queue in (None, one.lane.tier, one.lane.name)]


def _lines(
    kind: Literal["list", "later"], names: Sequence[bytes], counts: Sequence[int], default: bytes
) -> Iterator[Line]:
    for name, count in zip(names, counts, strict=True):
        key = name.decode(errors="replace")
        place = keys.place_of(key)
        yield Line(key, Lane(place.tier, place.model or default.decode()), kind, count)


def purge(client: redis.Redis, found: Sequence[Line], settings: QueueSettings) -> int:
    """Revoke the tasks that ``lines`` found; return how many. Raises redis-py's errors."""
    chains = Chains(settings, worker="")
    return sum(_purge(client, line, settings.result_ttl_s, chains) for line in found)


def _purge(client: redis.Redis, line: Line, result_ttl_s: int, chains: Chains) -> int:
    script, ended, missed, few = bind(client, "purge"), 0, 0, 1
    while ended + missed < line.tasks:
        payloads = _head(client, line, min(few, CALL_TASKS, line.tasks - ended))
        if not payloads:
            break
        ends = [_end(payload, line, chains) for payload in payloads]
        args: list[Argument] = [result_ttl_s, line.kind, len(ends)]
        for payload, end in zip(payloads, ends, strict=True):
            digest = hashlib.sha1(payload, usedforsecurity=False).hexdigest()
            args += (digest, end.task_id, end.meta, int(end.keep), end.reply, end.label)
        taken = int(script(keys=[line.key], args=[*args, *following(ends)]))
        ended += taken
        missed += 0 if taken else len(payloads)  # workers have claimed them meanwhile
        few = max(1, CALL_BYTES * len(payloads) // max(1, sum(map(len, payloads))))
    return ended


def _head(client: redis.Redis, line: Line, count: int) -> list[bytes]:
    """Return the payloads of the next tasks, in the order of serving."""
    raw: Any = client
    if line.kind == "later":
        return list(raw.zrange(line.key, 0, count - 1))
    return list(reversed(raw.lrange(line.key, -count, -1)))


def _end(payload: bytes, line: Line, chains: Chains) -> Final:
    """Return the end of one task; without an id and a meta if its id cannot be read."""
    error = TaskRevoked("it was purged from its queue before a worker started it")
    named, caller = label("cancelled", line.lane.tier, line.lane.model), keys.place_of(line.list_key).caller
    try:
        envelope = peek(payload)
    except Undecodable:
        envelope = None
    if envelope is None:  # it cannot be read, or only by decompressing its body
        task_id, reply = identify(payload)
        meta = results.failure(task_id, error, worker="", caller=caller) if task_id else b""
        return Final(None, task_id or "", meta, reply=reply, label=named)
    return Final(
        None,
        envelope.id,
        results.failure(envelope.id, error, worker="", caller=caller),
        keep=not envelope.headers.get("ignore_result"),
        reply=envelope.reply_to,
        label=named,
        follows=chains.buried(payload, error, line.list_key),
    )


def set_paused(client: redis.Redis, queue: str, paused: bool) -> bool:
    """Pause a queue, or resume it; return False if it already was in that state. Raises redis-py's errors."""
    return bool(bind(client, "pause")(args=[queue, int(paused)]))
