# SPDX-License-Identifier: Apache-2.0
"""All waits of an asyncio client on one subscription, one mailbox for each waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import redis.asyncio
from redis.exceptions import RedisError

from gpuinfer.client import core
from gpuinfer.client.core import Origin
from gpuinfer.client.subscription import Subscription
from gpuinfer.queue import keys
from gpuinfer.queue.connection import explain
from gpuinfer.queue.results import TaskStatus

#: A final status; None: the subscription stands (again), so look at the result key now; or why it cannot.
Mailbox = asyncio.Queue[TaskStatus | Exception | None]


class Waits:
    """Hears of the ends of a client's own tasks on its reply channel, and of others' by their ids."""

    def __init__(self, client: redis.asyncio.Redis, origin: Origin, user: str) -> None:
        self._user = user
        self._origin = origin
        self._subscription = Subscription(client, self)
        self._mailboxes: dict[str, set[Mailbox]] = {}

    @contextmanager
    def watch(self, task_ids: Collection[str]) -> Iterator[Mailbox]:
        """Give a mailbox that tells when to look and, once for each task, the final status.

        Where the subscription stands already it does not tell to look: who watches looks by itself, once.
        That look raises BrokerError when Redis is away at the beginning; later it is waited for.
        """
        mailbox: Mailbox = asyncio.Queue()
        self._join(task_ids, mailbox)
        try:
            yield mailbox
        finally:
            self._part(task_ids, mailbox)

    async def aclose(self) -> None:
        """Stop listening."""
        await self._subscription.aclose()

    def _join(self, task_ids: Iterable[str], mailbox: Mailbox) -> None:
        channels = set()
        for task_id in task_ids:
            self._mailboxes.setdefault(task_id, set()).add(mailbox)
            channels.add(self._origin.channel if self._origin.made(task_id) else keys.result(task_id))
        self._subscription.listen(channels)

    def _part(self, task_ids: Iterable[str], mailbox: Mailbox) -> None:
        """Take a mailbox away, and leave the channels of others' tasks that nobody waits for any more."""
        left = []
        for task_id in task_ids:
            boxes = self._mailboxes[task_id]
            boxes.discard(mailbox)
            if not boxes:
                del self._mailboxes[task_id]
                if not self._origin.made(task_id):
                    left.append(keys.result(task_id))
        if left:
            self._subscription.leave(left)

    # -- what the subscription tells ------------------------------------------------------

    def waiting(self) -> int:
        """Return how many tasks are waited for."""
        return len(self._mailboxes)

    def heard(self, channel: str, data: bytes | None) -> None:
        """Hand a publication to those who wait for what it tells; have them look where it tells nothing."""
        told = None if data is None else core.heard(channel, data, self._origin)
        if told is None:
            self._wake(channel)
            return
        for status in told:  # one that is not final is a notice of an end that stands under its key
            for box in self._mailboxes.get(status.id, ()):
                box.put_nowait(status if status.final else None)

    def failed(self, exc: Exception) -> None:
        """Raise this in all who wait."""
        error = explain(exc, self._user) if isinstance(exc, RedisError | OSError) else exc
        for box in {box for boxes in self._mailboxes.values() for box in boxes}:
            box.put_nowait(error)

    def _wake(self, channel: str) -> None:
        """Tell those to look who listen to a channel."""
        ids: Iterable[str] = [channel.removeprefix(keys.RESULT_PREFIX)]
        if channel == self._origin.channel:
            ids = filter(self._origin.made, self._mailboxes)
        for box in {box for task_id in ids for box in self._mailboxes.get(task_id, ())}:
            box.put_nowait(None)
