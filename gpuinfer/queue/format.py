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

from gpuinfer.errors import FormatMismatch
from gpuinfer.queue import keys

#: Who is told first of another format, before the error is raised.
OnMismatch = Callable[[FormatMismatch], object]


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
    """Return redis-py's handshake (``redis_connect_func``), with a look at the number at its end."""
    return partial(_greet, on_mismatch=on_mismatch)


def _greet(connection: Any, on_mismatch: OnMismatch | None) -> None:
    # A health check would connect again from within, without end, to a Redis that does not answer.
    connection.on_connect_check_health(check_health=False)
    connection.send_command("GET", keys.FORMAT_KEY, check_health=False)
    try:
        check(connection.read_response())
    except FormatMismatch as exc:
        connection.disconnect()
        if on_mismatch is not None:
            on_mismatch(exc)
        raise


async def async_greeting(connection: Any) -> None:
    """Do the same for an asyncio connection."""
    await connection.on_connect_check_health(check_health=False)
    await connection.send_command("GET", keys.FORMAT_KEY, check_health=False)
    try:
        check(await connection.read_response())
    except FormatMismatch:
        await connection.disconnect()
        raise


def establish(client: redis.Redis) -> None:
    """Give an empty Redis our number. Raises FormatMismatch where there is another, and redis-py's errors."""
    check(client.set(keys.FORMAT_KEY, keys.FORMAT, nx=True, get=True))  # type: ignore[arg-type]  # not decoded
