# SPDX-License-Identifier: Apache-2.0
"""What an asyncio client submits in one turn of the event loop, on its way in one call for each list."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from gpuinfer.client import core
from gpuinfer.client.core import Call, Ready
from gpuinfer.settings import QueueSettings


class Outgoing:
    """Collects tasks until the event loop's next turn."""

    def __init__(self, submit: Callable[[Call], Awaitable[bytes]], settings: QueueSettings) -> None:
        self._submit = submit
        self._settings = settings
        self._tasks: list[Ready] = []
        self._answers: dict[str, asyncio.Future[None]] = {}
        self._running: set[asyncio.Task[None]] = set()

    def put(self, task: Ready) -> asyncio.Future[None]:
        """Submit a task with this turn's others; the future ends when Redis has it, or with its error."""
        loop = asyncio.get_running_loop()
        if not self._tasks:
            loop.call_soon(self._send)
        self._tasks.append(task)
        answer = self._answers[task.submission.id] = loop.create_future()
        return answer

    def _send(self) -> None:
        tasks, self._tasks = self._tasks, []
        answers, self._answers = self._answers, {}
        for call in core.joined(tasks, self._settings):
            running = asyncio.get_running_loop().create_task(self._call(call, answers), name="submit")
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _call(self, call: Call, answers: Mapping[str, asyncio.Future[None]]) -> None:
        failure: BaseException | None = None
        try:
            await self._submit(call)
        except BaseException as exc:  # each caller has its own
            failure = exc
        for task_id in call.ids:
            answer = answers[task_id]
            if answer.done():
                continue
            if failure is None:
                answer.set_result(None)
            elif isinstance(failure, asyncio.CancelledError):
                answer.cancel()
            else:
                answer.set_exception(failure)
