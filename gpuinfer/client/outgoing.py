# SPDX-License-Identifier: Apache-2.0
"""Joins the tasks that an asyncio client submits in one event loop turn into one call per Redis list."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from gpuinfer.client import calls
from gpuinfer.client.calls import Accepted, Call, Ready
from gpuinfer.queue.quota import Rate
from gpuinfer.settings import QueueSettings


class Outgoing:
    """Collects tasks until the next turn of the event loop."""

    def __init__(self, submit: Callable[[Call], Awaitable[Accepted]], settings: QueueSettings) -> None:
        self._submit = submit
        self._settings = settings
        self._tasks: list[Ready] = []
        self._answers: dict[str, asyncio.Future[Rate | None]] = {}
        self._running: set[asyncio.Task[None]] = set()

    def put(self, task: Ready) -> asyncio.Future[Rate | None]:
        """Submit a task with the others of this turn; the future ends when Redis has it, or with its error.

        Its result is the state of the caller's rate limit, if it has one.
        """
        loop = asyncio.get_running_loop()
        if not self._tasks:
            loop.call_soon(self._send)
        self._tasks.append(task)
        answer = self._answers[task.submission.id] = loop.create_future()
        return answer

    def _send(self) -> None:
        tasks, self._tasks = self._tasks, []
        answers, self._answers = self._answers, {}
        for call in calls.joined(tasks, self._settings):
            running = asyncio.get_running_loop().create_task(self._call(call, answers), name="submit")
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _call(self, call: Call, answers: Mapping[str, asyncio.Future[Rate | None]]) -> None:
        """Submit tasks together. If the queue or the caller's quota cannot take all, submit what fits."""
        parts, refused = [call], _Refused()
        while parts:
            part = parts.pop()
            failure, rate = refused.failure_of(part), None
            if failure is None:
                failure, rate = await self._try(part)
                if failure is not None and (fits := calls.fitting(failure)):
                    parts.append(part.first(fits))
                    part = part.without(fits)
                elif failure is not None and calls.full(failure):
                    if len(part.ids) > 1:
                        parts += reversed(part.halves())
                        continue
                    refused.note(part, failure)
            if isinstance(failure, asyncio.CancelledError):
                part, parts = call, []
            for task_id in part.ids:
                _give(answers[task_id], failure, rate)

    async def _try(self, call: Call) -> tuple[BaseException | None, Rate | None]:
        try:
            return None, (await self._submit(call)).rate
        except BaseException as exc:  # handed to each caller's future
            return exc, None


class _Refused:
    """Refusals of single tasks: a task that is not smaller would be refused, too."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None
        self._size = 0

    def note(self, call: Call, failure: BaseException) -> None:
        room = calls.full(failure)
        if room and (self._failure is None or call.least < self._size):
            self._failure, self._size = failure, call.least if room == "size" else 0

    def failure_of(self, call: Call) -> BaseException | None:
        return self._failure if self._failure is not None and call.least >= self._size else None


def _give(answer: asyncio.Future[Rate | None], failure: BaseException | None, rate: Rate | None) -> None:
    if answer.done():
        return
    if failure is None:
        answer.set_result(rate)
    elif isinstance(failure, asyncio.CancelledError):
        answer.cancel()
    else:
        answer.set_exception(failure)
