# SPDX-License-Identifier: Apache-2.0
"""Operations of both clients, written once: a generator yields a question to Redis, and is sent the answer.

The synchronous client runs it with ``run``, the asyncio client with ``arun``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from gpuinfer.queue.direct import Argument
from gpuinfer.queue.scripts import Name


class Script(NamedTuple):
    """A call of one of the queue's scripts."""

    name: Name
    keys: Sequence[str]
    args: Sequence[Argument]


#: The scripts that such operations call.
SCRIPTS: tuple[Name, ...] = ("origin", "known", "history", "cancel", "revive", "erase")

#: A question to Redis: a command, or a script.
Ask = tuple[Argument, ...] | Script
T = TypeVar("T")
#: An operation with the result T. An error of redis-py is raised at its ``yield``.
Steps = Generator[Ask, Any, T]
#: Translates errors of redis-py that an operation does not handle.
Errors = AbstractContextManager[None, None]


def run(steps: Steps[T], ask: Callable[[Ask], Any], errors: Errors) -> T:
    """Run an operation and return its result. Raises its errors, and those of ``ask`` through ``errors``."""
    try:
        wanted = next(steps)
        while True:
            try:
                answer = ask(wanted)
            except BaseException as exc:
                with errors:
                    wanted = steps.throw(exc)
            else:
                wanted = steps.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


async def arun(steps: Steps[T], ask: Callable[[Ask], Awaitable[Any]], errors: Errors) -> T:
    """Run an operation, as ``run`` does, in an event loop."""
    try:
        wanted = next(steps)
        while True:
            try:
                answer = await ask(wanted)
            except BaseException as exc:
                with errors:
                    wanted = steps.throw(exc)
            else:
                wanted = steps.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result
