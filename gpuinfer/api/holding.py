# SPDX-License-Identifier: Apache-2.0
"""How many bytes of bodies one process holds, and which of them makes way: pure, with an injected clock.

A body takes its announced length before any of it is read, so that no two hold parts of what both need. One
of unknown length takes room as it grows. Small bodies have some room that large ones cannot take. A body that
does not move is given up after ``stall_s``, and after ``PRESSED_S`` where others wait for its room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: A body moves when this many bytes more have come, or its end.
STEP_BYTES = 64 * 1024
#: A body of at most this many bytes may use the room that is kept for such.
SMALL_BYTES = 64 * 1024
#: The part of the room that small bodies have beside the rest.
SMALL_SHARE = 0.25
#: Seconds without a move after which a body makes way for others.
PRESSED_S = 1.0


@dataclass(slots=True, eq=False)
class Permit:
    """The room of one body, from its first byte until its task is submitted."""

    taken: int = 0
    received: int = 0
    #: When it last moved, and how much of it had come then.
    moved_at: float = 0.0
    moved: int = 0
    reading: bool = True
    #: Ends the reading of a body that makes way; returns at once.
    give_up: Callable[[], object] = bool


class Holding:
    """The room for bodies. ``most_bytes``: in all, without what small ones have beside it."""

    def __init__(self, most_bytes: int, stall_s: float, clock: Callable[[], float]) -> None:
        self.most_bytes = most_bytes
        self.stall_s = stall_s
        self._clock = clock
        #: In the order in which they began.
        self._permits: dict[Permit, None] = {}
        self.used = 0

    def begin(self) -> Permit:
        """Return the permit of a body that has taken nothing yet."""
        permit = Permit(moved_at=self._clock())
        self._permits[permit] = None
        return permit

    def take(self, permit: Permit, size: int) -> bool:
        """Give a body room for ``size`` bytes in all; return whether there was."""
        more = size - permit.taken
        small = size <= SMALL_BYTES
        most = self.most_bytes + (self.most_bytes * SMALL_SHARE if small else 0)
        if more > 0 and self.used + more > most:
            return False
        self.used += max(0, more)
        permit.taken += max(0, more)
        return True

    def keep(self, permit: Permit, size: int) -> None:
        """Take back what a body has beyond ``size`` bytes."""
        surplus = max(0, permit.taken - size)
        self.used -= surplus
        permit.taken -= surplus

    def came(self, permit: Permit, received: int) -> None:
        """Note how much of a body has come."""
        permit.received = received
        if received - permit.moved >= STEP_BYTES:
            permit.moved, permit.moved_at = received, self._clock()

    def resume(self, permit: Permit) -> None:
        """A body that has waited for room is read from now on; the wait was not its fault."""
        permit.moved_at = self._clock()

    def patience(self, permit: Permit) -> float:
        """Return for how many seconds to wait for a body's next bytes."""
        return max(0.0, permit.moved_at + self.stall_s - self._clock())

    def press(self, size: int) -> bool:
        """Give up stalled bodies, the longest first, to free ``size`` bytes; return whether any was."""
        now = self._clock()
        stalled = [one for one in self._permits if one.reading and now - one.moved_at >= PRESSED_S]
        stalled.sort(key=lambda one: one.moved_at)
        free, any_was = self.most_bytes - self.used, False
        for one in stalled:
            if free >= size:
                break
            if one.taken > SMALL_BYTES:
                free += one.taken
                any_was = True
                one.reading = False
                one.give_up()
        return any_was

    def leave(self, permit: Permit) -> None:
        """Take a body's room back; a second time, nothing happens."""
        if permit in self._permits:
            del self._permits[permit]
            self.used -= permit.taken
            permit.taken = 0
