# SPDX-License-Identifier: Apache-2.0
"""Time limits on the solo pool: soft interrupts the inference thread, hard ends the process.

A small thread watches the clock, so that the limits hold while the main thread waits for Redis.
Should native code sit on the GIL, no Python thread runs at all; the kernel's interval timer then
ends the process a moment after the hard limit (SIGALRM, default action).
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gpuinfer.errors import SoftTimeLimitExceeded

#: Seconds after the hard limit at which the kernel ends a process whose Python no longer runs.
KERNEL_GRACE_S = 2.0


def _raise_in(thread_id: int, exc: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(exc) if exc is not None else None
    )


class _Interrupt(SoftTimeLimitExceeded):
    """Raised inside the inference thread, by another thread, when the soft limit passes."""


class Deadline:
    """Watches one forward pass at a time.

    ``on_hard`` is called once, in the watching thread, when the hard limit has passed; it must end
    the process.
    """

    def __init__(self, on_hard: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_hard = on_hard
        self._clock = clock
        self._changed = threading.Condition()
        self._soft_at: float | None = None
        self._hard_at: float | None = None
        self._thread_id = 0
        self._fired = False
        self._closed = False
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)
        self._thread.start()

    @contextmanager
    def guard(self, soft_s: float, hard_s: float) -> Iterator[None]:
        """Hold the limits over the block. Raises SoftTimeLimitExceeded where Python can be interrupted.

        A block that ends after its soft limit without having been interrupted is exceeded all the same.
        """
        now = self._clock()
        with self._changed:
            self._fired = False
            self._thread_id = threading.get_ident()
            self._soft_at, self._hard_at = now + soft_s, now + hard_s
            self._changed.notify()
        signal.setitimer(signal.ITIMER_REAL, hard_s + KERNEL_GRACE_S)
        try:
            yield
            self._disarm()
        except _Interrupt:
            self._disarm()
            raise SoftTimeLimitExceeded(f"ran longer than its soft limit of {soft_s:g} s") from None
        except BaseException:
            self._disarm()
            raise
        if self._fired:
            raise SoftTimeLimitExceeded(f"ran longer than its soft limit of {soft_s:g} s")

    def _disarm(self) -> None:
        """Stop the clocks and take back an interrupt that is on its way."""
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            with self._changed:
                self._soft_at = self._hard_at = None
            if self._fired:
                _raise_in(threading.get_ident(), None)
        except _Interrupt:
            self._disarm()

    def close(self) -> None:
        """End the watching thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=1)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                now = self._clock()
                if self._hard_at is not None and now >= self._hard_at:
                    self._hard_at = None
                    self._on_hard()
                elif self._soft_at is not None and now >= self._soft_at:
                    self._soft_at = None
                    self._fired = True
                    _raise_in(self._thread_id, _Interrupt)
                due = [at for at in (self._soft_at, self._hard_at) if at is not None]
                self._changed.wait(max(0.0, min(due) - now) if due else None)
