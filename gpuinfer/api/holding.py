# SPDX-License-Identifier: Apache-2.0
"""Limits the memory for request bodies in one process. Pure, with an injected clock.

A body reserves its announced length before it is read, so that no two bodies block each other halfway. A body
of unknown length reserves memory as it grows. Some memory is reserved for small bodies. A stalled body is
aborted after ``stall_s``, or after ``PRESSED_S`` if others wait for memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: A body makes progress when this many more bytes, or its end, have arrived.
STEP_BYTES = 64 * 1024
#: Maximum bytes of a small body, which may use the reserve.
SMALL_BYTES = 64 * 1024
#: Size of the reserve for small bodies, as a share of the limit, in addition to it.
SMALL_SHARE = 0.25
#: Seconds without progress after which a body is aborted if others wait.
PRESSED_S = 1.0


@dataclass(slots=True, eq=False)
class Permit:
    """The memory reserved for one body, from its first byte until its task is submitted."""

    taken: int = 0
    received: int = 0
    #: When it last made progress, and the bytes received by then.
    moved_at: float = 0.0
    moved: int = 0
    reading: bool = True
    #: Aborts the reading of the body; returns at once.
    give_up: Callable[[], object] = bool


class Holding:
    """The memory for bodies. ``most_bytes``: the limit, without the reserve for small bodies."""

    def __init__(self, most_bytes: int, stall_s: float, clock: Callable[[], float]) -> None:
        self.most_bytes = most_bytes
        self.stall_s = stall_s
        self._clock = clock
        #: Oldest first.
        self._permits: dict[Permit, None] = {}
        self.used = 0

    def begin(self) -> Permit:
        """Return a permit without reserved memory."""
        permit = Permit(moved_at=self._clock())
        self._permits[permit] = None
        return permit

    def take(self, permit: Permit, size: int) -> bool:
        """Reserve ``size`` bytes in total for a body; return whether that was possible."""
        more = size - permit.taken
        small = size <= SMALL_BYTES
        most = self.most_bytes + (self.most_bytes * SMALL_SHARE if small else 0)
        if more > 0 and self.used + more > most:
            return False
        self.used += max(0, more)
        permit.taken += max(0, more)
        return True

    def keep(self, permit: Permit, size: int) -> None:
        """Release the reserved bytes beyond ``size``."""
        surplus = max(0, permit.taken - size)
        self.used -= surplus
        permit.taken -= surplus

    def came(self, permit: Permit, received: int) -> None:
        """Record the received bytes of a body."""
        permit.received = received
        if received - permit.moved >= STEP_BYTES:
            permit.moved, permit.moved_at = received, self._clock()

    def resume(self, permit: Permit) -> None:
        """Restart the stall timer of a body that waited for memory."""
        permit.moved_at = self._clock()

    def patience(self, permit: Permit) -> float:
        """Return the maximum seconds to wait for a body's next bytes."""
        return max(0.0, permit.moved_at + self.stall_s - self._clock())

    def press(self, size: int) -> bool:
        """Abort stalled bodies, longest stall first, to free ``size`` bytes; return whether there were
        any."""
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
        """Release a body's memory. May be called twice."""
        if permit in self._permits:
            del self._permits[permit]
            self.used -= permit.taken
            permit.taken = 0
