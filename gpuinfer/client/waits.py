# SPDX-License-Identifier: Apache-2.0
"""All waits of an asyncio client on one subscription connection, one mailbox for each waiter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis.asyncio

from gpuinfer.client.core import Origin
from gpuinfer.errors import UnusableRedis
from gpuinfer.queue import keys, results
from gpuinfer.queue.connection import AWAY, typed_errors
from gpuinfer.queue.results import TaskStatus

log = logging.getLogger(__name__)

#: Seconds between attempts to reach Redis again.
RETRY_S = 0.2

#: A final status, or None: the subscription has (again) begun, so look at the result key now.
Mailbox = asyncio.Queue[TaskStatus | None]


class Waits:
    """Hears of the ends of a client's own tasks on its reply channel, and of others' by their ids."""

    def __init__(self, client: redis.asyncio.Redis, origin: Origin) -> None:
        self._client = client
        self._origin = origin
        self._pubsub: Any = None
        self._mailboxes: dict[str, set[Mailbox]] = {}
        #: Task ids that are subscribed to one by one.
        self._by_id: set[str] = set()
        #: True once the reply channel has been asked for, and while that is confirmed.
        self._joined = self._listening = False
        self._reader: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def watch(self, task_id: str) -> AsyncIterator[Mailbox]:
        """Give a mailbox that tells when to look and, once, the final status.

        Raises BrokerUnavailable when Redis is away at the beginning; later it is waited for.
        """
        mailbox: Mailbox = asyncio.Queue()
        with typed_errors():
            await self._subscribe(task_id, mailbox)
        try:
            yield mailbox
        finally:
            await self._unsubscribe(task_id, mailbox)

    async def aclose(self) -> None:
        """Stop listening."""
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader
        if self._pubsub is not None:
            await self._pubsub.aclose()

    async def _subscribe(self, task_id: str, mailbox: Mailbox) -> None:
        async with self._lock:
            self._mailboxes.setdefault(task_id, set()).add(mailbox)
            try:
                if self._pubsub is None:
                    self._pubsub = self._client.pubsub()
                if not self._origin.made(task_id):
                    self._by_id.add(task_id)
                    await self._pubsub.subscribe(keys.result(task_id))
                elif self._listening:
                    mailbox.put_nowait(None)  # it stands already: look
                elif not self._joined:
                    await self._pubsub.subscribe(self._origin.channel)
                    self._joined = True
            except BaseException:
                # Cancelled, perhaps, after the command was sent: nobody may stay subscribed.
                await self._leave(task_id, mailbox)
                raise
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read(), name="results")

    async def _unsubscribe(self, task_id: str, mailbox: Mailbox) -> None:
        async with self._lock:
            await self._leave(task_id, mailbox)

    async def _leave(self, task_id: str, mailbox: Mailbox) -> None:
        boxes = self._mailboxes.get(task_id, set())
        boxes.discard(mailbox)
        if boxes or self._mailboxes.pop(task_id, None) is None or task_id not in self._by_id:
            return
        self._by_id.discard(task_id)
        if self._pubsub is not None:
            with suppress(*AWAY):
                await self._pubsub.unsubscribe(keys.result(task_id))

    async def _read(self) -> None:
        away = False
        while self._pubsub.subscribed:
            try:
                event = await self._pubsub.get_message(timeout=5.0)
            except UnusableRedis:  # whoever waits is told so when he looks
                self._joined = self._listening = False
                self._look_all()
                return
            except AWAY as exc:
                self._listening = False
                if not away:
                    fields = {"reason": str(exc), "waiting": len(self._mailboxes)}
                    log.warning("Redis is away: %s", exc, extra={"action": "redis_away", "fields": fields})
                away = True
                await asyncio.sleep(RETRY_S)
                continue
            if away:
                log.info("Redis is back", extra={"action": "redis_back"})
                away = False
            if event is not None:
                self._dispatch(event)

    def _look_all(self) -> None:
        for boxes in self._mailboxes.values():
            for box in boxes:
                box.put_nowait(None)

    def _dispatch(self, event: dict[str, Any]) -> None:
        channel = event["channel"].decode()
        own = channel == self._origin.channel
        if event["type"] == "subscribe":
            self._listening |= own
            if own:
                wake = [task_id for task_id in self._mailboxes if task_id not in self._by_id]
            else:
                wake = [_id_of(channel)]
            for task_id in wake:
                for box in self._mailboxes.get(task_id, ()):
                    box.put_nowait(None)
        elif event["type"] == "message":
            data = event["data"]
            told = results.parse_many(data) if own else [results.parse(_id_of(channel), data)]
            for status in told:
                for box in self._mailboxes.get(status.id, ()):
                    box.put_nowait(status if status.final else None)


def _id_of(channel: str) -> str:
    return channel.removeprefix(keys.RESULT_PREFIX)
