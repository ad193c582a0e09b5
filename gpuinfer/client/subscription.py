# SPDX-License-Identifier: Apache-2.0
"""The channels of an asyncio client: one connection, and one task that connects and reads it.

In redis-py's PubSub any caller may reconnect, and two that do so at once interfere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Protocol

import hiredis
import redis.asyncio
from redis.exceptions import ConnectionError, InvalidResponse, RedisError

from gpuinfer.client.listener import ASK_AFTER_S, CHUNK, LOST_AFTER_S
from gpuinfer.queue.connection import refuses

log = logging.getLogger(__name__)

#: Seconds between attempts to reach Redis again.
RETRY_S = 0.2

_READ_BYTES = 1 << 16
_NOTHING = object()


class Hearer(Protocol):
    """Receives what a subscription reports. Methods must not block or raise."""

    def waiting(self) -> int:
        """Return the number of tasks waited for. With none, a lost connection is not reopened yet."""

    def heard(self, channel: str, data: bytes | None) -> None:
        """Take a message; None: the channel is subscribed now, and earlier messages may have been missed."""

    def failed(self, exc: Exception) -> None:
        """Take the permanent error that ended the subscription."""


class Subscription:
    """Channels on one connection of the client's pool. For one event loop."""

    def __init__(self, client: redis.asyncio.Redis, hearer: Hearer) -> None:
        self._client = client
        self._hearer = hearer
        self._connection: Any = None
        self._reader: Any = None
        #: Channels to listen to; channels requested on this connection; channels where the two may differ.
        self._wanted: set[str] = set()
        self._asked: set[str] = set()
        self._changed: set[str] = set()
        self._due = False
        #: The only task that connects, reads and reconnects.
        self._task: asyncio.Task[None] | None = None
        #: True once this connection has received anything.
        self._alive = False

    def listen(self, channels: Iterable[str]) -> None:
        """Listen to more channels. ``heard`` reports each as subscribed, again after each reconnection."""
        for channel in channels:
            if channel not in self._wanted:
                self._wanted.add(channel)
                self._changed.add(channel)
        running = self._task is not None and not self._task.done()
        if self._changed or not running:
            self._schedule()

    def leave(self, channels: Iterable[str]) -> None:
        """Stop listening to these channels."""
        for channel in channels:
            self._wanted.discard(channel)
            self._changed.add(channel)
        if self._changed:
            self._schedule()

    async def aclose(self) -> None:
        """Close the connection."""
        self._wanted.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._connection is not None:
            await self._drop()
            await self._client.connection_pool.release(self._connection)
            self._connection = None

    def _schedule(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Subscribe and unsubscribe all that changed in this turn of the loop."""
        self._due = False
        if self._reader is not None:
            self._ask()
        elif self._wanted and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run(), name="results")

    def _ask(self) -> None:
        changed, self._changed = self._changed, set()
        new = [one for one in changed if one in self._wanted and one not in self._asked]
        stale = [one for one in changed if one in self._asked and one not in self._wanted]
        self._asked.update(new)
        self._asked.difference_update(stale)
        self._write("UNSUBSCRIBE", stale)
        self._write("SUBSCRIBE", new)

    def _write(self, verb: str, channels: list[str]) -> None:
        for at in range(0, len(channels), CHUNK):
            whole: tuple[Any, ...] = (verb, *channels[at : at + CHUNK])
            self._connection._writer.write(hiredis.pack_command(whole))

    # -- the task -------------------------------------------------------------------------

    async def _run(self) -> None:
        away = False
        while True:
            try:
                await self._connect()
                if away:
                    log.info("Redis is back", extra={"action": "redis_back"})
                away = False
                await self._read()
            except (RedisError, OSError) as exc:
                was_alive = self._alive
                await self._drop()
                if refuses(exc):
                    return self._hearer.failed(exc)
                if not was_alive:
                    await asyncio.sleep(RETRY_S)
                if not self._hearer.waiting():
                    return None
                if not (was_alive or away):
                    away = True
                    fields = {"reason": str(exc), "waiting": self._hearer.waiting()}
                    log.warning("Redis is away: %s", exc, extra={"action": "redis_away", "fields": fields})
            except Exception as exc:  # another format, or a bug: no caller may wait forever
                await self._drop()
                return self._hearer.failed(exc)

    async def _connect(self) -> None:
        """Connect and subscribe to all channels. Raises redis-py's errors, UnusableRedis."""
        if self._connection is None:
            pool: Any = self._client.connection_pool  # not annotated
            self._connection = await pool.get_connection()
        elif not self._connection.is_connected:
            await self._connection.connect()
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=self._connection._parser.parse_error,
            notEnoughData=_NOTHING,
        )
        self._changed = set(self._wanted)
        self._ask()

    async def _drop(self) -> None:
        """Disconnect; nothing has been asked for then."""
        self._reader = None
        self._alive = False
        self._asked.clear()
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    async def _read(self) -> None:
        """Hand on what comes. Raises redis-py's errors, ConnectionError when Redis is silent for too long."""
        silent = False
        while True:
            try:
                async with asyncio.timeout(LOST_AFTER_S - ASK_AFTER_S if silent else ASK_AFTER_S):
                    data = await self._connection._reader.read(_READ_BYTES)
            except TimeoutError:
                if silent:
                    text = f"Redis was silent for {LOST_AFTER_S:.0f} s, and did not answer PING"
                    raise ConnectionError(text) from None
                silent = True
                self._connection._writer.write(hiredis.pack_command(("PING",)))
                continue
            if not data:
                raise ConnectionError("Connection closed by server.")
            silent = False
            self._reader.feed(data)
            while (event := self._reader.gets()) is not _NOTHING:
                self._take(event)

    def _take(self, event: Any) -> None:
        if isinstance(event, Exception):
            raise event
        self._alive = True
        if not isinstance(event, list):  # a PONG
            return
        if event[0] == b"message":
            self._hearer.heard(event[1].decode(errors="replace"), event[2])
        elif event[0] == b"subscribe":
            self._hearer.heard(event[1].decode(errors="replace"), None)
