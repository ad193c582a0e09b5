# SPDX-License-Identifier: Apache-2.0
"""All waits of an asyncio client on one subscription connection, one mailbox for each waiter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis.asyncio

from gpuinfer.client import core
from gpuinfer.client.core import Origin
from gpuinfer.errors import UnusableRedis
from gpuinfer.queue import keys
from gpuinfer.queue.connection import AWAY, typed_errors
from gpuinfer.queue.results import TaskStatus

log = logging.getLogger(__name__)

#: Seconds between attempts to reach Redis again.
RETRY_S = 0.2

#: A final status, or None: the subscription has (again) begun, so look at the result key now.
Mailbox = asyncio.Queue[TaskStatus | None]


class Waits:
    """Hears of the ends of a client's own tasks on its reply channel, and of others' by their ids."""

    def __init__(self, client: redis.asyncio.Redis, origin: Origin, user: str) -> None:
        self._client = client
        self._user = user
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
    async def watch(self, task_ids: Collection[str]) -> AsyncIterator[Mailbox]:
        """Give a mailbox that tells when to look and, once for each task, the final status.

        Where the subscription stands already it does not tell to look: who watches looks by itself, once.
        Raises BrokerError when Redis is away at the beginning; later it is waited for.
        """
        mailbox: Mailbox = asyncio.Queue()
        try:
            if self._listening and all(map(self._origin.made, task_ids)):
                self._join(task_ids, mailbox)
            else:
                async with self._lock:
                    self._join(task_ids, mailbox)
                    await self._subscribe(task_ids, mailbox)
            yield mailbox
        finally:
            strange = self._part(task_ids, mailbox)
            if strange:
                async with self._lock:
                    await self._unsubscribe(strange)

    def _join(self, task_ids: Iterable[str], mailbox: Mailbox) -> None:
        for task_id in task_ids:
            self._mailboxes.setdefault(task_id, set()).add(mailbox)

    def _part(self, task_ids: Iterable[str], mailbox: Mailbox) -> list[str]:
        """Take a mailbox away; return the ids whose own channels nobody listens to any more."""
        strange = []
        for task_id in task_ids:
            boxes = self._mailboxes.get(task_id)
            if boxes is None:
                continue
            boxes.discard(mailbox)
            if not boxes:
                del self._mailboxes[task_id]
                if task_id in self._by_id:
                    strange.append(task_id)
        return strange

    async def aclose(self) -> None:
        """Stop listening."""
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader
        if self._pubsub is not None:
            await self._pubsub.aclose()

    async def _subscribe(self, task_ids: Collection[str], mailbox: Mailbox) -> None:
        if self._pubsub is None:
            self._pubsub = self._client.pubsub()
        strange = [task_id for task_id in task_ids if not self._origin.made(task_id)]
        own = len(strange) < len(task_ids)
        with typed_errors(self._user):
            if strange:
                # Before the command: cancelled after it was sent, they are left all the same.
                self._by_id.update(strange)
                await self._pubsub.subscribe(*(keys.result(task_id) for task_id in strange))
            if own and self._listening:
                mailbox.put_nowait(None)  # it stands already: look
            elif own and not self._joined:
                await self._pubsub.subscribe(self._origin.channel)
                self._joined = True
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read(), name="results")

    async def _unsubscribe(self, task_ids: Iterable[str]) -> None:
        """Leave the channels of ids that nobody waits for meanwhile."""
        left = [task_id for task_id in task_ids if task_id not in self._mailboxes]
        self._by_id.difference_update(left)
        if left and self._pubsub is not None:
            with suppress(*AWAY):
                await self._pubsub.unsubscribe(*(keys.result(task_id) for task_id in left))

    async def _read(self) -> None:
        away = False
        while self._pubsub.subscribed:
            try:
                event = await self._pubsub.get_message(timeout=5.0)
            except UnusableRedis:  # each waiter meets the error at its next read
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
        for box in {box for boxes in self._mailboxes.values() for box in boxes}:
            box.put_nowait(None)

    def _dispatch(self, event: dict[str, Any]) -> None:
        channel = event["channel"].decode(errors="replace")
        own = channel == self._origin.channel
        if event["type"] == "subscribe":
            self._listening |= own
            self._wake(channel)
        elif event["type"] == "message":
            told = core.heard(channel, event["data"], self._origin)
            if told is None:
                self._wake(channel)
            for status in told or ():  # one that is not final is a notice of an end that stands under its key
                for box in self._mailboxes.get(status.id, ()):
                    box.put_nowait(status if status.final else None)

    def _wake(self, channel: str) -> None:
        """Tell those to look who listen to a channel."""
        own = channel == self._origin.channel
        wake = [one for one in self._mailboxes if one not in self._by_id] if own else [_id_of(channel)]
        for box in {box for task_id in wake for box in self._mailboxes.get(task_id, ())}:
            box.put_nowait(None)


def _id_of(channel: str) -> str:
    return channel.removeprefix(keys.RESULT_PREFIX)
