# SPDX-License-Identifier: Apache-2.0
"""What both clients do, written once: a generator yields what to ask Redis, and is sent the answer.

Each client runs it in its own way: ``run`` waits for an answer, ``arun`` awaits it.
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


#: The scripts that steps call.
SCRIPTS: tuple[Name, ...] = ("origin", "known", "history", "cancel", "revive", "erase")

#: What Redis is asked: a command, or a script.
Ask = tuple[Argument, ...] | Script
T = TypeVar("T")
#: redis-py's errors are raised where the answer would be.
Steps = Generator[Ask, Any, T]
#: Turns redis-py's errors that the steps let pass into others, or does not.
Errors = AbstractContextManager[None, None]


def run(steps: Steps[T], ask: Callable[[Ask], Any], errors: Errors) -> T:
    """Take all steps and return their result. Raises theirs, and what ``ask`` raises by way of ``errors``."""
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
    """Do as ``run``, from an event loop."""
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
