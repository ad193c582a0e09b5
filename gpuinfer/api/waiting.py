# SPDX-License-Identifier: Apache-2.0
"""Waiting for a task's end, for as long as the caller asks, stays, and this process runs."""

from __future__ import annotations

import asyncio
import math
import re
from contextlib import suppress

from starlette.types import Receive, Scope

from gpuinfer.api.shared import header, shared
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


async def until_ended(scope: Scope, receive: Receive, task_id: str, seconds: float) -> TaskStatus:
    """Wait for the end of a task, of the time, of the caller's patience, or of this process.

    Return the task's state then. Raises InputError, TaskNotFound, BrokerError.
    """
    ours = shared(scope)
    client = ours.client
    if seconds <= 0:
        return await client.status(task_id)
    ending = asyncio.ensure_future(client.wait(task_id, seconds))
    stopping = asyncio.ensure_future(ours.stopping.wait())
    leaving = asyncio.ensure_future(_disconnected(receive))
    others = (stopping, leaving)
    try:
        await asyncio.wait((ending, *others), return_when=asyncio.FIRST_COMPLETED)
        return await ending if ending.done() else await client.status(task_id)
    finally:
        for task in (ending, *others):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
