# SPDX-License-Identifier: Apache-2.0
"""The number of the format in which things lie in Redis.

Each new connection of ours asks for it in its handshake, so no program touches what it cannot read, whichever
call comes first, and also after a reconnection to another Redis. Scripts that begin something (``epoch``,
``submit``) ask again. An empty Redis has no number; the first worker or watcher sets it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import redis
from redis.exceptions import AskError, ClusterError, MasterDownError, ResponseError

from gpuinfer.errors import ClusterUnsupported, FormatMismatch, UnusableRedis
from gpuinfer.queue import keys

#: Who is told first of another format, before the error is raised.
OnMismatch = Callable[[UnusableRedis], object]


def mismatch(found: str) -> FormatMismatch:
    """Return the error for a Redis of the format ``found``."""
    newer = found.isdecimal() and int(found) > keys.FORMAT
    remedy = (
        "a newer edition has written it: install that one here"
        if newer
        else "once nothing of the other edition runs, gpuinfer redis migrate changes what it can"
    )
    return FormatMismatch(
        f"what lies in Redis has format {found}, and this program reads format {keys.FORMAT} alone; {remedy}",
        "broker.url",
    )


def check(number: bytes | str | None) -> None:
    """Accept our number, or none at all. Raises FormatMismatch."""
    found = number.decode(errors="replace") if isinstance(number, bytes) else number
    if found is not None and found != str(keys.FORMAT):
        raise mismatch(found)


def greeting(on_mismatch: OnMismatch | None = None) -> Callable[[Any], None]:
    """Return redis-py's handshake (``redis_connect_func``), with a look at the number at its end.

    A Redis Cluster is refused there, too: our scripts touch keys of many slots.
    """
    return partial(_greet, on_mismatch=on_mismatch)


#: What is asked in one packet at the end of each handshake: the server's mode, and our number.
_QUESTIONS = (("HELLO",), ("GET", keys.FORMAT_KEY))


def _greet(connection: Any, on_mismatch: OnMismatch | None) -> None:
    # A health check would connect again from within, without end, to a Redis that does not answer.
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
    """Do the same for an asyncio connection."""
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
    """Look at the answers. Raises UnusableRedis, and what Redis said to the second question."""
    if not isinstance(hello, Exception):  # a user who may not ask is told below
        said = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=False))
        if said.get(b"mode", said.get("mode")) in (b"cluster", "cluster"):
            raise clustered()
    if isinstance(number, Exception):
        raise clustered() if is_of_a_cluster(number) else number
    check(number)


def clustered() -> ClusterUnsupported:
    """Return the error for a Redis Cluster."""
    return ClusterUnsupported(
        "this Redis is part of a Redis Cluster, and gpuinfer needs one by itself: its scripts move tasks "
        "between keys that a cluster keeps on different nodes; name a Redis with cluster-enabled no",
        "broker.url",
    )


def is_of_a_cluster(exc: Exception) -> bool:
    """Tell an answer that only a node of a cluster gives."""
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
    """Give an empty Redis our number. Raises FormatMismatch where there is another, and redis-py's errors."""
    check(client.set(keys.FORMAT_KEY, keys.FORMAT, nx=True, get=True))  # type: ignore[arg-type]  # not decoded
