# SPDX-License-Identifier: Apache-2.0
"""Reading a request's body, within the room that the process has for bodies.

A body is not read before there is room for it: what its client sends waits in the sockets' buffers.
"""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from gpuinfer.api.admission import SLACK_BYTES
from gpuinfer.api.holding import PRESSED_S, SMALL_BYTES, Holding, Permit
from gpuinfer.errors import FrontBusy, PayloadTooLarge, SlowBody

#: Where a request's scope, and each copy of it, has the permits of its bodies: a list.
PERMITS = "gpuinfer.permits"
#: A body waits for room at most this long.
WAIT_S = 5.0


class Receiver:
    """Reads the bodies of one process."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        #: Who waits for room, in the order in which they came.
        self._waiting: dict[Permit, asyncio.Future[None]] = {}

    async def read(self, scope: Scope, receive: Receive, announced: int, limit: int) -> bytes:
        """Return a body of at most ``limit`` bytes; its room is taken until ``release``.

        ``announced``: its length as its header has it; 0: unknown. Raises PayloadTooLarge, SlowBody,
        FrontBusy, ClientDisconnect.
        """
        if announced > limit:
            raise too_large(limit)
        if announced <= SMALL_BYTES and _is_here(receive):
            # Most requests: one packet, which is held already, and which api.max_requests bounds.
            message = await receive()
            whole: bytes = message.get("body", b"")
            if message["type"] == "http.request" and len(whole) <= min(SMALL_BYTES, limit):
                return whole
            return await self._bounded(scope, _again(message, receive), announced, limit)
        return await self._bounded(scope, receive, announced, limit)

    async def _bounded(self, scope: Scope, receive: Receive, announced: int, limit: int) -> bytes:
        permit = self._holding.begin()
        scope[PERMITS].append(permit)
        if not self._holding.take(permit, announced or SMALL_BYTES):
            await self._wait_for_room(permit, announced or SMALL_BYTES)
        try:
            body = await self._read(permit, receive, limit)
        except TimeoutError:
            raise SlowBody(
                f"the body stalled: less than 64 KiB came within {self._holding.stall_s:g} s, or "
                f"{PRESSED_S:g} s while others wait; {permit.received} bytes had come",
                "body",
            ) from None
        permit.reading = False
        return body

    async def _read(self, permit: Permit, receive: Receive, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._next(permit, receive)
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large(limit)
            if size > permit.taken and not self._holding.take(
                permit, min(limit, max(size, 2 * permit.taken))
            ):
                raise self._busy()
            parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)
            self._holding.came(permit, size)

    async def _next(self, permit: Permit, receive: Receive) -> Message:
        async with asyncio.timeout(self._holding.patience(permit)) as limit:
            now = asyncio.get_running_loop().time
            permit.give_up = lambda: limit.reschedule(now())
            return await receive()

    async def _wait_for_room(self, permit: Permit, size: int) -> None:
        """Wait until there is room, and make stalled bodies give theirs up. Raises FrontBusy."""
        permit.reading = False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        try:
            while not self._holding.take(permit, size):
                self._holding.press(size)
                if loop.time() >= deadline:
                    raise self._busy()
                room = self._waiting[permit] = loop.create_future()
                await asyncio.wait((room,), timeout=min(PRESSED_S, max(0.0, deadline - loop.time())))
        finally:
            self._waiting.pop(permit, None)
        permit.reading = True
        self._holding.resume(permit)

    def unpacking(self, scope: Scope) -> Room:
        """Return the room of what a body unpacks to, beside that of the packed one."""
        return Room(self, scope)

    async def take(self, scope: Scope, permit: Permit | None, size: int) -> Permit:
        """Give a body that is unpacked room for ``size`` bytes in all. Raises FrontBusy after a while.

        ``permit``: what it has already.
        """
        if permit is None:
            permit = self._holding.begin()
            scope[PERMITS].append(permit)
        if not self._holding.take(permit, size):
            await self._wait_for_room(permit, size)
        permit.reading = False
        return permit

    def keep(self, scope: Scope, permit: Permit, size: int) -> None:
        """Give back room beyond ``size`` bytes of what was unpacked, and the packed body's."""
        self._holding.keep(permit, size)
        for other in scope[PERMITS]:
            if other is not permit:
                self._holding.leave(other)
        scope[PERMITS][:] = [permit]
        self._wake()

    def _busy(self) -> FrontBusy:
        most = self._holding.most_bytes // 2**20
        return FrontBusy(f"this front has no room for another body; api.max_held_mb is {most}")

    def release(self, scope: Scope) -> None:
        """Give the room of a request's body back, where it has any.

        Who came last gets it: where more wait than there is room for, the first have waited in vain already,
        and one of them that stalls would be the next to hold it.
        """
        permits: list[Permit] = scope[PERMITS]
        if not permits:
            return
        while permits:
            self._holding.leave(permits.pop())
        self._wake()

    def _wake(self) -> None:
        for room in reversed(self._waiting.values()):
            if not room.done():
                room.set_result(None)


class Room:
    """The room of what one body unpacks to."""

    def __init__(self, receiver: Receiver, scope: Scope) -> None:
        self._receiver, self._scope = receiver, scope
        self._permit: Permit | None = None

    async def take(self, size: int) -> None:
        """Get room for ``size`` bytes in all. Raises FrontBusy where there is none for a while."""
        self._permit = await self._receiver.take(self._scope, self._permit, size)

    def keep(self, size: int) -> None:
        """It is unpacked, and has ``size`` bytes; nobody holds the packed body any more."""
        if self._permit is not None:
            self._receiver.keep(self._scope, self._permit, size)


def _is_here(receive: Receive) -> bool:
    """Return whether the whole body has arrived, as uvicorn knows; False under another server."""
    return getattr(getattr(receive, "__self__", None), "more_body", True) is False


def _again(message: Message, receive: Receive) -> Receive:
    """Return a receive that gives this message first."""
    given = [message]

    async def first() -> Message:
        return given.pop() if given else await receive()

    return first


def too_large(limit: int) -> PayloadTooLarge:
    """Return the error for a body of more than ``limit`` bytes."""
    return PayloadTooLarge(
        f"the body is larger than {limit} bytes; queue.max_payload_bytes is {limit - SLACK_BYTES}", "inputs"
    )
