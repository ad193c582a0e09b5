# SPDX-License-Identifier: Apache-2.0
"""Waiting for a task's end, for as long as the caller asks, stays, and this process runs."""

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
    """Return for how many seconds to wait, cut to ``longest_s``. Raises InputError."""
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:  # NaN is not, either
        raise InputError(f"must be a number of seconds, 0 or more, got {text[:80]!r}", "wait")
    return min(seconds, longest_s)


def preferred_time(scope: Scope) -> int | None:
    """Return the seconds of a ``Prefer: wait=5`` (RFC 7240); None: there is none to be read."""
    text = header(scope, b"prefer")
    found = _PREFERRED.search(text) if text else None
    return int(found[1]) if found else None


async def until_ended(
    scope: Scope, receive: Receive, task_id: str, seconds: float, *, raw: bool = False
) -> TaskStatus:
    """Wait for the end of a task, of the time, of the caller's patience, or of this process.

    ``raw``: arrays may be ``arrays.Raw``, see ``results.parse``.

    Return the task's state then. Raises InputError, BrokerError; TaskNotFound also for a task that the caller
    may not see, and that as late as for one of which nothing is known.
    """
    client, only = shared(scope).client, caller(scope).readable
    if seconds > 0:
        with client.watch(task_id) as watch, suppress(TimeoutError):
            async with bounded(scope, receive, seconds):
                return await client.ended(task_id, watch, patient=True, only=only, raw=raw)
    return await client.status(task_id, only=only)


class bounded:
    """Raise TimeoutError in what runs within once the time is over, the caller has gone, or we stop.

    A timer is all that a short wait costs: whether the caller is there is asked after ``ASK_AFTER_S``.
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
    """Return the next that a watch hears. Raises TimeoutError when ``bounded`` would.

    It costs less: no timer, unless it lasts.
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
    """Puts a TimeoutError among a watch's news once the time is over, the caller has gone, or we stop."""

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
        """Ask from now on whether the caller is there, and end in time."""
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
        """It has ended."""
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        if self._leaving is not None:
            self._leaving.cancel()
