# SPDX-License-Identifier: Apache-2.0
"""What both clients do is written once, as steps: how they are run, with an answer or an error for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import ConnectionError, ResponseError

from gpuinfer.client.aio import AsyncClient
from gpuinfer.client.awaited import MGET_MOST, Waiting
from gpuinfer.client.driver import introduce
from gpuinfer.client.origin import Origin
from gpuinfer.client.steps import Ask, Script, Steps, T, arun, run
from gpuinfer.errors import BrokerUnavailable, ResultGone
from gpuinfer.queue.connection import typed_errors

pytestmark = pytest.mark.unit

#: Runs steps, with what answers what they ask.
Runner = Callable[[Steps[Any], Callable[[Ask], Any]], Any]


def in_sync(steps: Steps[T], answer: Callable[[Ask], Any]) -> T:
    return run(steps, answer, typed_errors())


def in_a_loop(steps: Steps[T], answer: Callable[[Ask], Any]) -> T:
    async def ask(wanted: Ask) -> Any:
        return answer(wanted)

    return asyncio.run(arun(steps, ask, typed_errors()))


both = pytest.mark.parametrize("runs", [in_sync, in_a_loop])


def refuse(error: Exception) -> Callable[[Ask], Any]:
    def answer(_: Ask) -> Any:
        raise error

    return answer


@both
def test_each_answer_goes_where_it_was_asked_for(runs: Runner) -> None:
    """In order, commands and scripts; the result is what the steps return."""
    asked: list[Ask] = []

    def steps() -> Steps[list[int]]:
        first = yield "GET", "a"
        return [first, (yield Script("known", (), ["b"]))]

    def answer(wanted: Ask) -> int:
        asked.append(wanted)
        return len(asked)

    assert runs(steps(), answer) == [1, 2]
    assert asked == [("GET", "a"), Script("known", (), ["b"])]


@both
def test_what_redis_refuses_may_be_caught_in_the_steps(runs: Runner) -> None:
    """As redis-py raises it; what they let pass is one of our errors."""

    def steps() -> Steps[str]:
        try:
            yield "GET", "a"
        except ResponseError as exc:
            return str(exc)
        return ""

    assert runs(steps(), refuse(ResponseError("NOPERM"))) == "NOPERM"
    with pytest.raises(BrokerUnavailable):
        runs(steps(), refuse(ConnectionError("away")))


@both
def test_an_error_of_the_steps_themselves_is_not_redis_s(runs: Runner) -> None:
    """A file that cannot be read does not become a Redis that is away."""

    def steps() -> Steps[None]:
        yield "GET", "a"
        raise PermissionError("a file")

    with pytest.raises(PermissionError, match="a file"):
        runs(steps(), lambda _: None)


def test_a_process_that_could_not_be_introduced_tries_again() -> None:
    """Also when the request that was to do it was cancelled; a user without the right to does not."""

    async def cancelled(_: Ask) -> Any:
        raise asyncio.CancelledError

    origin = Origin()
    assert (origin.to_tell(), origin.to_tell()) == (True, False)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(arun(introduce(origin), cancelled, typed_errors()))
    assert origin.to_tell()
    run(introduce(origin), refuse(ResponseError("NOPERM")), typed_errors())
    assert not origin.to_tell()


async def test_ends_found_before_a_look_is_cut_off_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tasks the first thousand are read; then Redis goes, or the time is over. No end is lost."""
    ended = b'{"status": "SUCCESS", "result": 1, "task_id": "?"}'
    cuts: list[BaseException] = [BrokerUnavailable("away"), asyncio.CancelledError()]
    asked: list[int] = []

    async def ask(wanted: Ask) -> list[Any]:
        if isinstance(wanted, Script):
            return [1] * (len(wanted.args) // 3)
        if asked and cuts:
            asked.clear()
            raise cuts.pop(0)
        asked.append(len(wanted))
        return [ended] * (len(wanted) - 1)

    async with AsyncClient("redis://127.0.0.1:1/0") as client:
        monkeypatch.setattr(client, "_ask", ask)
        waiting = Waiting(map(str, range(MGET_MOST + 1)), Origin())
        for cut in tuple(cuts):
            with pytest.raises(type(cut)):
                await client._check(waiting, patient=True)
        found = await client._check(waiting, patient=True)
    assert sorted(int(status.id) for status in found) == list(range(MGET_MOST + 1))


@both
def test_whether_a_task_was_known_is_asked_again_after_an_error(runs: Runner) -> None:
    """Else its expired result would be told as an id that was never submitted."""
    waiting = Waiting(["of another process"], Origin())

    def away(wanted: Ask) -> list[None]:
        if isinstance(wanted, Script):
            raise ConnectionError("gone")
        return [None]

    with pytest.raises(BrokerUnavailable):
        runs(waiting.check(waiting.ids, patient=False), away)
    with pytest.raises(ResultGone):
        runs(
            waiting.check(waiting.ids, patient=False), lambda ask: [1] if isinstance(ask, Script) else [None]
        )
