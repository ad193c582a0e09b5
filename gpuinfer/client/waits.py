# SPDX-License-Identifier: Apache-2.0
"""All waits of an asyncio client, on one subscription."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable
from typing import Self

import redis.asyncio
from redis.exceptions import RedisError

from gpuinfer.client import awaited
from gpuinfer.client.origin import Origin
from gpuinfer.client.subscription import Subscription
from gpuinfer.queue import keys
from gpuinfer.queue.connection import explain
from gpuinfer.queue.results import TaskStatus

#: A final status; None: check the result key now, as messages may have been missed; or a permanent error.
News = TaskStatus | Exception | None


class Watch:
    """News of some tasks for one waiter, from its creation on. Use it as a context manager.

    It yields each task's final status once, and None when to check the result keys. If the channel is
    subscribed already, there is no None: for tasks submitted earlier, check the result keys once first.
    """

    __slots__ = ("_news", "_task_ids", "_waiter", "_waits")

    def __init__(self, waits: Waits, task_ids: Collection[str]) -> None:
        self._waits = waits
        self._task_ids = task_ids
        self._news: deque[News] = deque()
        self._waiter: asyncio.Future[None] | None = None
        waits.join(task_ids, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._waits.part(self._task_ids, self)

    def put(self, news: News) -> None:
        """Append news."""
        self._news.append(news)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def put_back(self, news: News) -> None:
        """Return news to the front, so that ``next`` returns them again."""
        self._news.appendleft(news)

    async def next(self) -> News:
        """Wait for the next news. One waiter at a time."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._news.popleft()


class Waits:
    """Tells waiters when tasks end: a client's own on its reply channel, others on a channel per task."""

    def __init__(self, client: redis.asyncio.Redis, origin: Origin, user: str) -> None:
        self._user = user
        self._origin = origin
        self._subscription = Subscription(client, self)
        self._watches: dict[str, set[Watch]] = {}

    def watch(self, task_ids: Collection[str]) -> Watch:
        """Return a watch of these tasks, from now on."""
        return Watch(self, task_ids)

    async def aclose(self) -> None:
        """Stop listening."""
        await self._subscription.aclose()

    def join(self, task_ids: Iterable[str], watch: Watch) -> None:
        """Send news of these tasks to a watch, until ``part``."""
        channels = set()
        for task_id in task_ids:
            self._watches.setdefault(task_id, set()).add(watch)
            channels.add(self._origin.channel if self._origin.made(task_id) else keys.result(task_id))
        self._subscription.listen(channels)

    def part(self, task_ids: Iterable[str], watch: Watch) -> None:
        """Stop news to a watch, and unsubscribe channels that no watch needs."""
        left = []
        for task_id in task_ids:
            watches = self._watches[task_id]
            watches.discard(watch)
            if not watches:
                del self._watches[task_id]
                if not self._origin.made(task_id):
                    left.append(keys.result(task_id))
        if left:
            self._subscription.leave(left)

    # -- called by the subscription -------------------------------------------------------

    def waiting(self) -> int:
        """Return the number of tasks waited for."""
        return len(self._watches)

    def heard(self, channel: str, data: bytes | None) -> None:
        """Pass a message to the watches of its tasks; if it is unreadable, have them check the keys."""
        told = None if data is None else awaited.heard(channel, data, self._origin)
        if told is None:
            self._wake(channel)
            return
        for status in told:  # not final: a notice that the end is stored under the task's key
            for watch in self._watches.get(status.id, ()):
                watch.put(status if status.final else None)

    def failed(self, exc: Exception) -> None:
        """Raise this error in all waiters."""
        error = explain(exc, self._user) if isinstance(exc, RedisError | OSError) else exc
        for watch in {one for watches in self._watches.values() for one in watches}:
            watch.put(error)

    def _wake(self, channel: str) -> None:
        """Have the waiters of a channel check the result keys."""
        ids: Iterable[str] = [channel.removeprefix(keys.RESULT_PREFIX)]
        if channel == self._origin.channel:
            ids = filter(self._origin.made, self._watches)
        for watch in {one for task_id in ids for one in self._watches.get(task_id, ())}:
            watch.put(None)
