# SPDX-License-Identifier: Apache-2.0
"""All waits of an asyncio client on one subscription connection, one mailbox for each waiter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis.asyncio

from gpuinfer.log import get_logger
from gpuinfer.queue import keys, results
from gpuinfer.queue.connection import AWAY, typed_errors
from gpuinfer.queue.results import TaskStatus

log = get_logger(__name__)

#: Seconds between attempts to reach Redis again.
RETRY_S = 0.2

#: A final status, or None: the subscription has (again) begun, so look at the result key now.
Mailbox = asyncio.Queue[TaskStatus | None]


class Waits:
    """Subscribes to result channels while somebody waits for them."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._pubsub: Any = None
        self._mailboxes: dict[str, set[Mailbox]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def watch(self, task_id: str) -> AsyncIterator[Mailbox]:
        """Give a mailbox that tells when to look and, once, the final status.

        Raises BrokerUnavailable when Redis is away at the beginning; later it is waited for.
        """
        mailbox: Mailbox = asyncio.Queue()
        channel = keys.result(task_id)
        with typed_errors():
            await self._subscribe(channel, mailbox)
        try:
            yield mailbox
        finally:
            await self._unsubscribe(channel, mailbox)

    async def aclose(self) -> None:
        """Stop listening."""
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader
        if self._pubsub is not None:
            await self._pubsub.aclose()

    async def _subscribe(self, channel: str, mailbox: Mailbox) -> None:
        async with self._lock:
            known = self._mailboxes.setdefault(channel, set())
            known.add(mailbox)
            try:
                if self._pubsub is None:
                    self._pubsub = self._client.pubsub()
                await self._pubsub.subscribe(channel)
            except BaseException:
                # Cancelled, perhaps, after the command was sent: nobody may stay subscribed.
                await self._leave(channel, mailbox)
                raise
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read(), name="results")

    async def _unsubscribe(self, channel: str, mailbox: Mailbox) -> None:
        async with self._lock:
            await self._leave(channel, mailbox)

    async def _leave(self, channel: str, mailbox: Mailbox) -> None:
        if self._forget(channel, mailbox) and self._pubsub is not None:
            with suppress(*AWAY):
                await self._pubsub.unsubscribe(channel)

    def _forget(self, channel: str, mailbox: Mailbox) -> bool:
        """Drop a mailbox; return whether it was the channel's last."""
        boxes = self._mailboxes.get(channel, set())
        boxes.discard(mailbox)
        return not boxes and self._mailboxes.pop(channel, None) is not None

    async def _read(self) -> None:
        away = False
        while self._mailboxes:
            try:
                event = await self._pubsub.get_message(timeout=5.0)
            except AWAY as exc:
                if not away:
                    log.warning("redis_away", reason=str(exc), waiting=len(self._mailboxes))
                away = True
                await asyncio.sleep(RETRY_S)
                continue
            if away:
                log.info("redis_back")
                away = False
            if event is not None:
                self._dispatch(event)

    def _dispatch(self, event: dict[str, Any]) -> None:
        channel = event["channel"].decode()
        boxes = self._mailboxes.get(channel, set())
        if event["type"] == "subscribe":
            for box in boxes:
                box.put_nowait(None)
        elif event["type"] == "message":
            status = results.parse(channel.removeprefix(keys.RESULT_PREFIX), event["data"])
            if status.final:
                for box in boxes:
                    box.put_nowait(status)
