# SPDX-License-Identifier: Apache-2.0
"""Time limits on the solo pool: soft interrupts the inference thread, hard ends the process.

A small thread watches the clock, so that the limits hold while the main thread waits for Redis. If native
code holds the GIL, no Python thread runs; then the kernel's interval timer ends the process shortly after the
hard limit (SIGALRM, default action).

An interrupt can occur between any two lines, even between acquiring a lock and the block that releases it. So
the interrupted side uses no blocking lock. Instead both sides try once to get a gate, a lock that is never
released; the side that gets it decides whether an interrupt is sent. A sent interrupt is waited for, because
cancelling it with ``PyThreadState_SetAsyncExc(id, NULL)`` leaves CPython 3.11's eval breaker set.
"""

from __future__ import annotations

import ctypes
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpuinfer.errors import SoftTimeLimitExceeded

T = TypeVar("T")

#: Seconds after the hard limit when the kernel kills a process in which no Python code runs.
KERNEL_GRACE_S = 2.0
#: Maximum sleep of the watching thread in seconds, so that most blocks need not wake it.
LOOK_S = 1.0
#: Maximum seconds for ``on_hard``.
KERNEL_GRACE_AT_END_S = 15.0


class _Interrupt(BaseException):
    """Raised in the inference thread by the watching thread at the soft limit."""


@dataclass(slots=True)
class _Watch:
    """One guarded block."""

    thread_id: int
    soft_at: float
    hard_at: float
    #: What the block runs for: the value of ``expired`` after its hard limit.
    about: Sequence[Any] = ()
    #: Acquired once: by the block when it ends in time, or by the watcher when it interrupts it.
    gate: threading.Lock = field(default_factory=threading.Lock)
    sent: bool = False
    over: bool = False
    #: Set by the watcher after the soft limit, and after both.
    looked_at_soft: bool = False
    looked_at_hard: bool = False

    @property
    def next_at(self) -> float:
        """When the watcher must check it again."""
        if self.over or self.looked_at_hard:
            return math.inf
        return self.hard_at if self.looked_at_soft else min(self.soft_at, self.hard_at)


class Deadline:
    """Watches one block per thread: a forward pass, or preparing or finishing an input.

    ``on_hard`` is called once, in the watching thread, at the hard limit of a block; its ``about`` is in
    ``expired`` then. It must end the process.
    """

    def __init__(self, on_hard: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_hard = on_hard
        #: Monotonic seconds.
        self.clock = clock
        #: Thread -> its block. Changed and copied by atomic operations, without a lock.
        self._watches: dict[int, _Watch] = {}
        self._ending = False
        #: ``about`` of the block that exceeded its hard limit.
        self.expired: Sequence[Any] = ()
        #: When the watching thread checks next unless woken; most blocks end before that.
        self._looks_at = math.inf
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._thread = threading.Thread(target=self._run, name="deadline", daemon=True)
        self._thread.start()

    def run(self, soft_s: float, hard_s: float, call: Callable[[], T], about: Sequence[Any] = ()) -> T:
        """Call ``call`` under the limits; return its result. Raises SoftTimeLimitExceeded.

        Python code is interrupted; native code is checked when it returns. Not a context manager, because an
        interrupt could occur in its entry and exit code, outside of any ``try``.
        """
        now = self.clock()
        thread = threading.get_ident()
        watch = _Watch(thread, now + soft_s, now + hard_s, about)
        result: list[T] = []
        failure: BaseException | None = None
        in_time = False
        try:
            self._watches[thread] = watch
            self._arm(now)
            if watch.soft_at < self._looks_at:
                self._calls.put(True)
            try:
                result.append(call())
            except _Interrupt:
                raise
            except BaseException as exc:
                failure = exc
            in_time = watch.gate.acquire(blocking=False)
            while not in_time and not watch.sent:
                time.sleep(0.001)
            for _ in range(
                0 if in_time else 10
            ):  # a sent interrupt is raised here, unless the model caught it
                time.sleep(0)
        except _Interrupt:
            in_time = False
        watch.over = True
        self._watches.pop(thread, None)
        self._arm(self.clock())
        if not in_time:
            raise SoftTimeLimitExceeded(f"ran longer than its soft limit of {soft_s:g} s")
        if failure is not None:
            raise failure
        return result[0]

    def _arm(self, now: float) -> None:
        """Set the kernel's timer to shortly after the earliest hard limit.

        If two threads do this at once, one may overwrite the other; the watching thread sets it again.
        """
        if not self._ending:
            watches = self._watches.copy().values()
            ends_at = min((watch.hard_at for watch in watches if not watch.looked_at_hard), default=None)
            rest = 0.0 if ends_at is None else max(0.001, ends_at + KERNEL_GRACE_S - now)
            signal.setitimer(signal.ITIMER_REAL, rest)

    def close(self) -> None:
        """End the watching thread."""
        self._calls.put(False)
        self._thread.join(timeout=1)

    def _run(self) -> None:
        goes_on = True
        while goes_on:
            # Set before checking: a block that starts in between either sees it and wakes this thread, or is
            # seen.
            self._looks_at = self.clock() + LOOK_S
            self._looks_at = min(self._looks_at, self._look())
            with suppress(queue.Empty):
                goes_on = self._calls.get(timeout=max(0.0, self._looks_at - self.clock()))

    def _look(self) -> float:
        """Enforce the limits of the running blocks; return when to check again."""
        watches = self._watches.copy().values()
        if not watches:
            return math.inf
        now = self.clock()
        for watch in watches:
            self._hold(watch, now)
        self._arm(now)
        return min(watch.next_at for watch in watches)

    def _hold(self, watch: _Watch, now: float) -> None:
        if watch.next_at <= now and not watch.looked_at_soft:
            watch.looked_at_soft = True
            if watch.gate.acquire(blocking=False):
                _interrupt(watch.thread_id)
                watch.sent = True
        if watch.next_at <= now:
            watch.looked_at_hard = True
            # on_hard needs a moment to record the offending task in Redis.
            self._ending = True
            signal.setitimer(signal.ITIMER_REAL, KERNEL_GRACE_AT_END_S)
            self.expired = watch.about
            self._on_hard()
            self._ending = False


def _interrupt(thread_id: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(_Interrupt))
