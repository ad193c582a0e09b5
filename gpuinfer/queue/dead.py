# SPDX-License-Identifier: Apache-2.0
"""The dead letters: tasks that were set aside because they killed workers or could not be read.

They are kept until they are retried or dropped, within limits (``queue.max_dead``, ``max_dead_bytes``,
``dead_ttl_s``): the oldest are dropped first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import orjson
import redis

from gpuinfer.errors import InputError, TaskNotFound
from gpuinfer.queue import keys
from gpuinfer.queue.message import Undecodable, peek
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QUEUES

#: The prefix that restore.lua adds to a payload: deliveries and deaths.
_MARK = re.compile(r'^\{"gpuinfer": \[\d+, \d+\], ')

_DROP = "gpuinfer dead drop removes it"
#: Answer of revive.lua when it did nothing -> why.
_REFUSED = {
    -1: f"already has a result; {_DROP}",
    -2: f"cannot be retried: its inputs are gone; {_DROP}",
    -3: "cannot be retried: {key!r} is not a list; delete or rename that key",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Letter:
    """One dead letter."""

    id: str
    #: The list it came from, and returns to when retried.
    list_key: str
    reason: str
    code: str
    deaths: int
    #: The worker that held it when it was set aside.
    worker: str
    #: Seconds since the epoch.
    at: float
    payload: str

    @property
    def queue(self) -> str:
        """The tier it waited in."""
        return keys.place_of(self.list_key).tier

    @property
    def model(self) -> str:
        """The model whose list it was in; empty: the default model."""
        return keys.place_of(self.list_key).model

    @property
    def task(self) -> str | None:
        """Return the name of the task; None if it cannot be read."""
        try:
            found = peek(self.payload.encode())
        except Undecodable:
            return None
        return found.task if found is not None else None

    def to_dict(self, *, payload: bool) -> dict[str, Any]:
        """Return it for JSON, with or without its message."""
        place = keys.place_of(self.list_key)
        body = asdict(self) | {
            "queue": place.tier,
            "model": place.model or None,
            "priority": place.priority,
            "task": self.task,
        }
        del body["list_key"]
        if not payload:
            del body["payload"]
        return body


def _parse(letter_id: str, raw: bytes) -> Letter:
    """Read a letter written by ``Store.bury``; anything else becomes a letter that says so."""
    try:
        body = orjson.loads(raw)
        return Letter(
            id=letter_id,
            list_key=str(body["list"]),
            reason=str(body["reason"]),
            code=str(body["code"]),
            deaths=int(body["deaths"]),
            worker=str(body["worker"]),
            at=float(body["at"]),
            payload=str(body["payload"]),
        )
    except (ValueError, TypeError, KeyError):
        return Letter(
            id=letter_id,
            list_key="",
            reason="not a dead letter of gpuinfer",
            code="unknown",
            deaths=0,
            worker="",
            at=0.0,
            payload=raw.decode("utf-8", "backslashreplace"),
        )


def letters(client: redis.Redis) -> list[Letter]:
    """Return all letters, the oldest first."""
    found = {letter_id.decode(): raw for letter_id, raw in client.hscan_iter(keys.DEAD, count=100)}
    return sorted((_parse(*item) for item in found.items()), key=lambda letter: (letter.at, letter.id))


def ids(client: redis.Redis) -> list[str]:
    """Return the ids of all letters, without reading the letters."""
    found: list[bytes] = client.hkeys(keys.DEAD)  # type: ignore[assignment]  # no decode_responses
    return sorted(letter_id.decode() for letter_id in found)


def get(client: redis.Redis, letter_id: str) -> Letter:
    """Return one letter. Raises TaskNotFound."""
    raw: bytes | None = client.hget(keys.DEAD, letter_id)  # type: ignore[assignment]  # no decode_responses
    if raw is None:
        raise _missing(letter_id)
    return _parse(letter_id, raw)


def owned(raw: bytes, only: str | None) -> bool:
    """Tell whether a letter's task belongs to the caller ``only``; None: any caller."""
    return only is None or keys.place_of(_parse("", raw).list_key).caller == only


def retry(client: redis.Redis, letter_id: str) -> None:
    """Return a letter to its list, under the same id, with its deaths reset to zero.

    Raises TaskNotFound. Raises InputError if the task can never run, if it has a result (another delivery of
    it succeeded), or if its list's key has another type; the letter is then kept.
    """
    raw: bytes | None = client.hget(keys.DEAD, letter_id)  # type: ignore[assignment]  # no decode_responses
    list_key, args = revival(letter_id, raw)
    revived(letter_id, list_key, bind(client, "revive")(keys=[list_key], args=args))


def revival(letter_id: str, raw: bytes | None) -> tuple[str, list[str | bytes | int]]:
    """Return the key and arguments of ``revive.lua`` for a letter. Raises as ``retry`` does."""
    if raw is None:
        raise _missing(letter_id)
    letter = _parse(letter_id, raw)
    return _revival(letter_id, letter.list_key, letter.payload)


def failed_revival(task_id: str, raw: bytes) -> tuple[str, list[str | bytes | int]]:
    """Return the key and arguments of ``revive.lua`` for a failed task. Raises InputError.

    ``raw``: its list and its message, as ``settle.lua`` keeps them.
    """
    list_key, _, payload = raw.decode(errors="backslashreplace").partition("\n")
    key, args = _revival(task_id, list_key, payload)
    return key, [*args, 1]


def failed_owned(raw: bytes, only: str | None) -> bool:
    """Tell whether a kept failed task belongs to the caller ``only``; None: any caller."""
    list_key = raw.partition(b"\n")[0].decode(errors="backslashreplace")
    return only is None or keys.place_of(list_key).caller == only


def _revival(letter_id: str, list_key: str, payload: str) -> tuple[str, list[str | bytes | int]]:
    payload, queue = _MARK.sub("{", payload), keys.place_of(list_key).tier
    try:
        envelope = peek(payload.encode())
    except Undecodable as exc:
        raise InputError(f"cannot be retried: {exc}; {_DROP}", letter_id) from None
    if queue not in QUEUES:
        raise InputError(f"cannot be retried: there is no queue {queue!r}", letter_id)
    beside = int(bool(envelope and envelope.beside))
    told = envelope.told if envelope is not None else b"}}"
    return list_key, [letter_id, payload, told, beside]


def revived(letter_id: str, list_key: str, answer: int, *, failed: bool = False) -> None:
    """Check the answer of ``revive.lua``. ``failed``: it was for a failed task. Raises as ``retry`` does."""
    if answer < 0:
        why = _REFUSED[answer].format(key=list_key)
        raise InputError(why.replace(_DROP, "submit it again") if failed else why, letter_id)
    if not answer:
        raise _missing(letter_id)


def drop(client: redis.Redis, letter_ids: Iterable[str]) -> int:
    """Delete letters and their bodies; return how many there were.

    Their failure results are kept until they expire.
    """
    wanted = list(letter_ids)
    return int(bind(client, "drop")(args=wanted)) if wanted else 0


def _missing(letter_id: str) -> TaskNotFound:
    return TaskNotFound(f"there is no dead letter {letter_id}", "task_id")
