# SPDX-License-Identifier: Apache-2.0
"""Reads request bodies within the process's memory limit for them.

A body is not read until memory is reserved for it; meanwhile its data waits in the socket buffers.
"""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from gpuinfer.api.admission import SLACK_BYTES
from gpuinfer.api.holding import PRESSED_S, SMALL_BYTES, Holding, Permit
from gpuinfer.errors import FrontBusy, PayloadTooLarge, SlowBody

#: Scope key of the list of a request's permits, shared by copies of the scope.
PERMITS = "gpuinfer.permits"
#: Maximum seconds that a body waits for memory.
WAIT_S = 5.0


class Receiver:
    """Reads the bodies of one process."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        #: Requests waiting for memory, oldest first.
        self._waiting: dict[Permit, asyncio.Future[None]] = {}

    async def read(self, scope: Scope, receive: Receive, announced: int, limit: int) -> bytes:
        """Return a body of at most ``limit`` bytes; its memory stays reserved until ``release``.

        ``announced``: its Content-Length; 0: unknown. Raises PayloadTooLarge, SlowBody, FrontBusy,
        ClientDisconnect.
        """
        if announced > limit:
            raise too_large(limit)
        if announced <= SMALL_BYTES and _is_here(receive):
            # Most requests: one packet, already in memory, and limited by api.max_requests.
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
                f"the body stalled: less than 64 KiB arrived within {self._holding.stall_s:g} s, or "
                f"{PRESSED_S:g} s while others wait; {permit.received} bytes had arrived",
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
        """Wait for memory, and abort stalled bodies to get it. Raises FrontBusy."""
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
        """Return the memory reservation for unpacking a body."""
        return Room(self, scope)

    async def take(self, scope: Scope, permit: Permit | None, size: int) -> Permit:
        """Reserve ``size`` bytes in total for an unpacked body. Raises FrontBusy if it has to wait too long.

        ``permit``: its reservation so far.
        """
        if permit is None:
            permit = self._holding.begin()
            scope[PERMITS].append(permit)
        if not self._holding.take(permit, size):
            await self._wait_for_room(permit, size)
        permit.reading = False
        return permit

    def keep(self, scope: Scope, permit: Permit, size: int) -> None:
        """Release the packed body's memory, and that of the unpacked body beyond ``size`` bytes."""
        self._holding.keep(permit, size)
        for other in scope[PERMITS]:
            if other is not permit:
                self._holding.leave(other)
        scope[PERMITS][:] = [permit]
        self._wake()

    def _busy(self) -> FrontBusy:
        most = self._holding.most_bytes // 2**20
        return FrontBusy(f"no memory left for another request body; api.max_held_mb is {most}")

    def release(self, scope: Scope) -> None:
        """Release the memory of a request's body, if it has any.

        The newest waiting request gets it: under overload the oldest ones are about to time out, and one of
        them might stall.
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
    """Reserves memory while one body is unpacked."""

    def __init__(self, receiver: Receiver, scope: Scope) -> None:
        self._receiver, self._scope = receiver, scope
        self._permit: Permit | None = None

    async def take(self, size: int) -> None:
        """Reserve ``size`` bytes in total. Raises FrontBusy if it has to wait too long."""
        self._permit = await self._receiver.take(self._scope, self._permit, size)

    def keep(self, size: int) -> None:
        """Call when the body is unpacked to ``size`` bytes and the packed one is freed."""
        if self._permit is not None:
            self._receiver.keep(self._scope, self._permit, size)


def _is_here(receive: Receive) -> bool:
    """Whether uvicorn has received the whole body; False under another server."""
    return getattr(getattr(receive, "__self__", None), "more_body", True) is False


def _again(message: Message, receive: Receive) -> Receive:
    """Return a receive that returns this message first."""
    given = [message]

    async def first() -> Message:
        return given.pop() if given else await receive()

    return first


def too_large(limit: int) -> PayloadTooLarge:
    """Return the error for a body of more than ``limit`` bytes."""
    return PayloadTooLarge(
        f"the body is larger than {limit} bytes; queue.max_payload_bytes is {limit - SLACK_BYTES}", "inputs"
    )
