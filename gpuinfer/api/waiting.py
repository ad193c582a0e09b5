# SPDX-License-Identifier: Apache-2.0
"""Waits for a task to end, until the timeout, the client's disconnect, or the process's stop."""

from __future__ import annotations

import asyncio
import math
import re
from contextlib import suppress
from types import TracebackType

from starlette.types import Receive, Scope

from gpuinfer.api.access import caller
from gpuinfer.api.shared import ASK_AFTER_S, header, shared
from gpuinfer.client.waits import News, Watch
from gpuinfer.errors import InputError
from gpuinfer.queue.results import TaskStatus

_PREFERRED = re.compile(r'(?:^|,)\s*wait\s*=\s*"?(\d{1,9})"?\s*(?=$|[,;])', re.IGNORECASE)


def waiting_time(text: str | None, longest_s: float) -> float:
    """Return the seconds to wait, at most ``longest_s``. Raises InputError."""
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:  # also refuses NaN
        raise InputError(f"must be a number of seconds, 0 or more, got {text[:80]!r}", "wait")
    return min(seconds, longest_s)


def preferred_time(scope: Scope) -> int | None:
    """Return the seconds of ``Prefer: wait=5`` (RFC 7240); None: missing or invalid."""
    text = header(scope, b"prefer")
    found = _PREFERRED.search(text) if text else None
    return int(found[1]) if found else None


async def until_ended(
    scope: Scope, receive: Receive, task_id: str, seconds: float, *, raw: bool = False
) -> TaskStatus:
    """Wait until the task ends, the time is over, the client disconnects, or the process stops.

    ``raw``: arrays may be ``arrays.Raw``, see ``results.parse``.

    Return the task's state then. Raises InputError, BrokerError; TaskNotFound also for a task that the caller
    may not see, after the same wait as for an unknown id.
    """
    client, only = shared(scope).client, caller(scope).readable
    if seconds > 0:
        with client.watch(task_id) as watch, suppress(TimeoutError):
            async with bounded(scope, receive, seconds):
                return await client.ended(task_id, watch, patient=True, only=only, raw=raw)
    return await client.status(task_id, only=only)


class bounded:
    """Raise TimeoutError in the block at the timeout, the client's disconnect, or the process's stop.

    A short wait costs only a timer: disconnects are checked after ``ASK_AFTER_S``.
    """

    __slots__ = ("_asking", "_leaving", "_receive", "_shared", "_timeout")

    def __init__(self, scope: Scope, receive: Receive, seconds: float) -> None:
        self._shared = shared(scope)
        self._receive = receive
        self._timeout = asyncio.timeout(0 if self._shared.stopping.is_set() else seconds)
        self._asking: asyncio.TimerHandle | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._shared.waits.add(self)
        self._asking = asyncio.get_running_loop().call_later(ASK_AFTER_S, self._ask)

    def end(self) -> None:
        """End the wait now."""
        if not self._timeout.expired():
            self._timeout.reschedule(0)

    def _ask(self) -> None:
        self._leaving = asyncio.get_running_loop().create_task(self._left(), name="caller")

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.end()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shared.waits.discard(self)
        if self._asking is not None:
            self._asking.cancel()
        if self._leaving is not None:
            self._leaving.cancel()
        await self._timeout.__aexit__(kind, value, trace)


async def next_news(scope: Scope, receive: Receive, watch: Watch, seconds: float) -> News:
    """Return the next news of a watch. Raises TimeoutError when ``bounded`` would.

    It is cheaper than ``bounded``: a short wait needs no timer.
    """
    ours = shared(scope)
    if ours.stopping.is_set():
        raise TimeoutError
    wait = _Wait(receive, seconds, watch)
    ours.waits.add(wait)
    if seconds > ASK_AFTER_S:
        ours.lastings.add(wait)
    else:
        wait.lasts()
    try:
        news = await watch.next()
    finally:
        ours.waits.discard(wait)
        wait.close()
    if type(news) is TimeoutError:
        raise news
    return news


class _Wait:
    """Adds a TimeoutError to a watch's news at the timeout, disconnect, or stop."""

    __slots__ = ("_began", "_leaving", "_receive", "_seconds", "_timer", "_watch", "ended")

    def __init__(self, receive: Receive, seconds: float, watch: Watch) -> None:
        self._receive = receive
        self._seconds = seconds
        self._watch = watch
        self._began = asyncio.get_running_loop().time()
        self._timer: asyncio.TimerHandle | None = None
        self._leaving: asyncio.Task[None] | None = None
        self.ended = False

    def lasts(self) -> None:
        """Start checking for a disconnect and the timeout."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._began + self._seconds, self.end)
        self._leaving = loop.create_task(self._left(), name="caller")

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.end()

    def end(self) -> None:
        """End the wait now."""
        if not self.ended:
            self._watch.put(TimeoutError())

    def close(self) -> None:
        """Clean up after the wait."""
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        if self._leaving is not None:
            self._leaving.cancel()
