# SPDX-License-Identifier: Apache-2.0
"""The format number of the data in Redis.

Each new connection of ours reads it in its handshake, so no program touches data that it cannot read,
whichever call comes first, even after a reconnection to another Redis. The scripts ``epoch`` and ``submit``
check it again. An empty Redis has no number; the first worker or watcher sets it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import redis
from redis.exceptions import AskError, ClusterError, MasterDownError, ResponseError

from gpuinfer.errors import ClusterUnsupported, FormatMismatch, UnusableRedis
from gpuinfer.queue import keys

#: Called with the error about another format, before it is raised.
OnMismatch = Callable[[UnusableRedis], object]


def mismatch(found: str) -> FormatMismatch:
    """Return the error for a Redis with the format ``found``."""
    newer = found.isdecimal() and int(found) > keys.FORMAT
    remedy = (
        "a newer version wrote it: install that version here"
        if newer
        else "once no program of the other version runs, gpuinfer redis migrate converts what it can"
    )
    return FormatMismatch(
        f"the data in Redis has format {found}, but this program reads only format {keys.FORMAT}; {remedy}",
        "broker.url",
    )


def check(number: bytes | str | None) -> None:
    """Raise FormatMismatch unless the number is ours, or there is none."""
    found = number.decode(errors="replace") if isinstance(number, bytes) else number
    if found is not None and found != str(keys.FORMAT):
        raise mismatch(found)


def greeting(on_mismatch: OnMismatch | None = None) -> Callable[[Any], None]:
    """Return a handshake for redis-py (``redis_connect_func``) that ends by checking the format number.

    It refuses a Redis Cluster, too: our scripts touch keys of many slots.
    """
    return partial(_greet, on_mismatch=on_mismatch)


#: Sent in one packet at the end of each handshake, to learn the server's mode and the format number.
_QUESTIONS = (("HELLO",), ("GET", keys.FORMAT_KEY))


def _greet(connection: Any, on_mismatch: OnMismatch | None) -> None:
    # With a health check, connecting to a Redis that does not answer would recurse endlessly.
    connection.on_connect_check_health(check_health=False)
    connection.send_packed_command(connection.pack_commands(_QUESTIONS), check_health=False)
    answers: list[Any] = []
    for _ in _QUESTIONS:
        try:
            answers.append(connection.read_response())
        except ResponseError as exc:
            answers.append(exc)
    try:
        _judge(*answers)
    except UnusableRedis as exc:
        connection.disconnect()
        if on_mismatch is not None:
            on_mismatch(exc)
        raise


async def async_greeting(connection: Any) -> None:
    """Check an asyncio connection, as ``greeting`` does."""
    await connection.on_connect_check_health(check_health=False)
    await connection.send_packed_command(connection.pack_commands(_QUESTIONS), check_health=False)
    answers: list[Any] = []
    for _ in _QUESTIONS:
        try:
            answers.append(await connection.read_response())
        except ResponseError as exc:
            answers.append(exc)
    try:
        _judge(*answers)
    except UnusableRedis:
        await connection.disconnect()
        raise


def _judge(hello: Any, number: Any) -> None:
    """Check the answers. Raises UnusableRedis, or Redis's error to the second command."""
    if not isinstance(hello, Exception):  # a user without the right to HELLO is checked below
        said = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=False))
        if said.get(b"mode", said.get("mode")) in (b"cluster", "cluster"):
            raise clustered()
    if isinstance(number, Exception):
        raise clustered() if is_of_a_cluster(number) else number
    check(number)


def clustered() -> ClusterUnsupported:
    """Return the error for a Redis Cluster."""
    return ClusterUnsupported(
        "this Redis is part of a Redis Cluster, but gpuinfer needs a standalone Redis: its scripts move "
        "tasks between keys that a cluster keeps on different nodes; use a Redis with cluster-enabled no",
        "broker.url",
    )


def is_of_a_cluster(exc: Exception) -> bool:
    """Tell whether only a node of a cluster gives this answer."""
    if isinstance(exc, MasterDownError):  # a replica's
        return False
    return isinstance(exc, AskError | ClusterError) or any(words in str(exc) for words in _OF_A_CLUSTER)


_OF_A_CLUSTER = (
    "hash to the same slot",
    "CROSSSLOT",
    "non local key in a cluster",
    "allowed in cluster mode",
)


def establish(client: redis.Redis) -> None:
    """Set our number in an empty Redis. Raises FormatMismatch if it has another, and redis-py's errors."""
    check(client.set(keys.FORMAT_KEY, keys.FORMAT, nx=True, get=True))  # type: ignore[arg-type]  # not decoded
