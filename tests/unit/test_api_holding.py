# SPDX-License-Identifier: Apache-2.0
"""The room that one process has for bodies, and who gets it."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuinfer.api import encodings, receiving
from gpuinfer.api.holding import PRESSED_S, SMALL_BYTES, STEP_BYTES, Holding
from gpuinfer.api.receiving import PERMITS, Receiver
from gpuinfer.errors import FrontBusy, PayloadTooLarge, SlowBody

pytestmark = pytest.mark.unit

MIB = 2**20


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Time stands still until a test moves it."""
    return Clock()


def test_room_is_bounded_and_comes_back(clock: Clock) -> None:
    """What is taken is counted until it is given back, once."""
    holding = Holding(8 * MIB, 10, clock)
    first, second = holding.begin(), holding.begin()
    assert holding.take(first, 4 * MIB)
    assert holding.take(second, 4 * MIB)
    assert not holding.take(second, 5 * MIB)
    holding.leave(first)
    holding.leave(first)
    assert holding.used == 4 * MIB
    assert holding.take(second, 5 * MIB)


def test_small_bodies_have_room_of_their_own(clock: Clock) -> None:
    """Large ones, however many, leave a quarter as much beside for small ones."""
    holding = Holding(MIB, 10, clock)
    assert holding.take(holding.begin(), MIB)
    assert [holding.take(holding.begin(), SMALL_BYTES) for _ in range(5)] == [True] * 4 + [False]


def test_a_body_moves_by_steps(clock: Clock) -> None:
    """Single bytes that trickle in are no move; a step is."""
    holding = Holding(MIB, 10, clock)
    permit = holding.begin()
    clock.now += 6
    holding.came(permit, STEP_BYTES - 1)
    assert holding.patience(permit) == 4
    holding.came(permit, STEP_BYTES)
    assert holding.patience(permit) == 10
    clock.now += 20
    assert holding.patience(permit) == 0


def test_the_longest_stalled_make_way(clock: Clock) -> None:
    """As many as are needed, none that still moves, no small one, and none that has been read."""
    holding = Holding(4 * MIB, 10, clock)
    given_up: list[int] = []
    permits = [holding.begin() for _ in range(4)]
    for number, permit in enumerate(permits):
        assert holding.take(permit, MIB)
        permit.give_up = partial(given_up.append, number)
    permits[0].reading = False
    clock.now += PRESSED_S
    holding.came(permits[2], STEP_BYTES)
    assert holding.press(MIB)
    assert given_up == [1]
    holding.leave(permits[1])
    assert holding.press(3 * MIB)
    assert given_up == [1, 3]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3 * MIB)), max_size=60))
def test_no_order_of_events_holds_more(events: list[tuple[int, int]]) -> None:
    """Whoever takes and leaves, the bound with its share for small ones holds, and nothing is lost."""
    holding = Holding(4 * MIB, 10, Clock())
    permits = [holding.begin() for _ in range(6)]
    for number, size in events:
        if size % 3 == 0:
            holding.leave(permits[number])
            permits[number] = holding.begin()
        else:
            holding.take(permits[number], size)
        assert holding.used == sum(one.taken for one in permits) <= 5 * MIB


# -- reading ------------------------------------------------------------------------------


class Client:
    """Sends what it is given, and then stalls."""

    def __init__(self, *parts: bytes, ends: bool = True) -> None:
        self._parts: Iterator[bytes] = iter(parts)
        self._left = len(parts)
        self._ends = ends
        #: uvicorn's: False once all of it has come.
        self.more_body = True
        self.scope: dict[str, Any] = {PERMITS: []}

    async def receive(self) -> dict[str, Any]:
        if not self._left:
            await asyncio.Event().wait()
        self._left -= 1
        more = self._left > 0 or not self._ends
        return {"type": "http.request", "body": next(self._parts), "more_body": more}


def receiver(most: int = 4 * MIB, stall_s: float = 60) -> Receiver:
    """Return one on the event loop's clock."""
    return Receiver(Holding(most, stall_s, asyncio.get_running_loop().time))


async def test_bodies_are_read_whole() -> None:
    """In one part or in many, with a length announced or without; too much is refused."""
    reads = receiver()
    for announced in (0, 3):
        for parts in ((b"abc",), (b"a", b"b", b"c")):
            client = Client(*parts)
            assert await reads.read(client.scope, client.receive, announced, MIB) == b"abc"
            reads.release(client.scope)
    for announced, size in ((2 * MIB, 1), (0, MIB + 1)):
        client = Client(b"x" * size)
        with pytest.raises(PayloadTooLarge):
            await reads.read(client.scope, client.receive, announced, MIB)


async def test_a_small_body_that_is_here_takes_no_room() -> None:
    """uvicorn's requests tell whether all has come; a large body is counted all the same."""
    reads = receiver(MIB)
    for size, permits in ((10, 0), (SMALL_BYTES + 1, 1)):
        client = Client(b"x" * size)
        client.more_body = False
        assert len(await reads.read(client.scope, client.receive, 0, MIB)) == size
        assert len(client.scope[PERMITS]) == permits


async def test_a_body_that_stalls_is_given_up() -> None:
    """408, after the time that is allowed."""
    client = Client(b"a", ends=False)
    with pytest.raises(SlowBody, match="1 bytes had arrived") as caught:
        await receiver(stall_s=0.05).read(client.scope, client.receive, 10, MIB)
    assert caught.value.http_status == 408


async def test_stalled_bodies_make_way_for_one_that_comes() -> None:
    """Two that hold all the room and stall are given up, though they had a minute alone; a third is read."""
    reads = receiver()
    stalled = [Client(b"a", ends=False) for _ in range(2)]

    async def stall(client: Client) -> None:
        try:
            with pytest.raises(SlowBody):
                await reads.read(client.scope, client.receive, 2 * MIB, 4 * MIB)
        finally:
            reads.release(client.scope)

    async with asyncio.TaskGroup() as group:
        for one in stalled:
            group.create_task(stall(one))
        await asyncio.sleep(0)
        client = Client(b"x" * 3 * MIB)
        assert len(await reads.read(client.scope, client.receive, 3 * MIB, 4 * MIB)) == 3 * MIB


async def test_without_room_for_long_it_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been read, and is about to be submitted, does not make way: 503."""
    monkeypatch.setattr(receiving, "WAIT_S", 0.05)
    reads = receiver(MIB)
    first, second = Client(b"x" * MIB), Client(b"x" * MIB)
    await reads.read(first.scope, first.receive, MIB, MIB)
    with pytest.raises(FrontBusy, match="max_held_mb is 1"):
        await reads.read(second.scope, second.receive, MIB, MIB)
    reads.release(second.scope)
    reads.release(first.scope)
    assert await reads.read(second.scope, second.receive, MIB, MIB)


async def test_what_a_body_unpacks_to_takes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one of 3 MiB waits for the first one's room of 4, and is refused after a while: 503."""
    monkeypatch.setattr(receiving, "WAIT_S", 0.05)
    reads = receiver()
    packed, limit = gzip.compress(bytes(3 * MIB)), 4 * MIB

    async def read(client: Client) -> bytes:
        body = await reads.read(client.scope, client.receive, 0, limit)
        room = reads.unpacking(client.scope)
        plain = await encodings.unpacked(body, "gzip", limit, room.take)
        room.keep(len(plain))
        return plain

    first, second = Client(packed), Client(packed)
    assert len(await read(first)) == 3 * MIB
    assert reads._holding.used == 3 * MIB
    with pytest.raises(FrontBusy, match="max_held_mb is 4"):
        await read(second)
    reads.release(second.scope)
    monkeypatch.setattr(receiving, "WAIT_S", 60)
    again = Client(packed)
    waits = asyncio.create_task(read(again))
    while not reads._waiting:
        await asyncio.sleep(0)
    reads.release(first.scope)
    assert len(await waits) == 3 * MIB
    reads.release(again.scope)
    assert reads._holding.used == 0
