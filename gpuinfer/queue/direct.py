# SPDX-License-Identifier: Apache-2.0
"""Redis commands without the overhead of redis-py's client (its pool and telemetry).

This saves 45 to 60 us of a script call, a third of it. The connections are redis-py's own, from the client's
pool, with their health checks, retries and errors.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import redis
from hiredis import pack_command
from redis.exceptions import NoScriptError, ResponseError

from gpuinfer.queue.scripts import Name, bind

Argument = bytes | str | int


class _Kept:
    """An idle connection."""

    __slots__ = ("_poll", "_sock", "connection")

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._sock: Any = None
        self._poll: Callable[[int], object] = _something

    @property
    def stale(self) -> bool:
        """Whether there is anything to read: no answer is expected, so it means that Redis closed it.

        redis-py creates a poll object for each check, which takes three times as long. May raise its errors.
        """
        sock = self.connection._sock
        if sock is not self._sock:  # reconnected since
            self._sock, self._poll = sock, _poll_of(sock)
        return bool(self._poll(0)) and bool(self.connection.can_read())


def _something(_: int) -> object:
    return True


def _poll_of(sock: Any) -> Callable[[int], object]:
    """Return a function that tells whether a socket has data; with TLS always true, so redis-py decides.

    TLS may have buffered data that poll does not see.
    """
    if sock is None or hasattr(sock, "pending"):
        return _something
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return poll.poll


class Direct:
    """Sends commands over connections that it keeps. Safe to share between threads, and across a fork."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._pid = os.getpid()
        self._idle: list[_Kept] = []

    def bind(self, name: Name) -> Callable[..., Any]:
        """Return a script to call with ``keys`` and ``args``."""
        return partial(self._run, bind(self._client, name))

    def _run(self, script: Any, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        try:
            return self.call("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:  # Redis has forgotten it
            script.sha = self._client.script_load(script.script)
            return self.call("EVALSHA", script.sha, len(keys), *keys, *args)

    def call(self, *command: Argument) -> Any:
        """Send a command and return its answer as Redis gives it. Raises redis-py's errors."""
        whole: tuple[Any, ...] = command
        packed = pack_command(whole)  # redis-py looks at each argument in Python first
        kept = self._take()
        connection = kept.connection
        try:
            return connection.retry.call_with_retry(
                lambda: _exchange(connection, packed), lambda _: connection.disconnect()
            )
        finally:
            self._idle.append(kept)

    def call_all(self, *commands: Sequence[Argument]) -> list[Any]:
        """Send read-only commands in one packet; return their answers. Raises redis-py's errors."""
        wholes: list[tuple[Any, ...]] = [tuple(command) for command in commands]
        packed = b"".join(map(pack_command, wholes))
        kept = self._take()
        connection = kept.connection
        try:
            answers: list[Any] = connection.retry.call_with_retry(
                lambda: _exchange_all(connection, packed, len(commands)), lambda _: connection.disconnect()
            )
            return answers
        finally:
            self._idle.append(kept)

    def _take(self) -> _Kept:
        if self._pid != os.getpid():  # after a fork: these belong to the parent
            self._pid, self._idle = os.getpid(), []
        try:
            kept = self._idle.pop()
        except IndexError:
            return _Kept(self._client.connection_pool.get_connection())
        try:
            stale = kept.stale
        except (redis.ConnectionError, redis.TimeoutError, OSError):
            stale = True
        if stale:
            kept.connection.disconnect()
        return kept

    def close(self) -> None:
        """Close the connections. The next call opens a new one."""
        while self._idle:
            connection = self._idle.pop().connection
            connection.disconnect()
            self._client.connection_pool.release(connection)


def _exchange(connection: Any, packed: bytes) -> Any:
    try:
        connection.send_packed_command((packed,))
        return connection.read_response()
    except ResponseError:
        raise
    except BaseException:
        connection.disconnect()  # else the next call would read the answer to this one
        raise


def _exchange_all(connection: Any, packed: bytes, count: int) -> list[Any]:
    try:
        connection.send_packed_command((packed,))
        return [connection.read_response() for _ in range(count)]
    except ResponseError:
        if count > 1:
            connection.disconnect()  # else the next call would read the remaining answers
        raise
    except BaseException:
        connection.disconnect()  # as above
        raise
