# SPDX-License-Identifier: Apache-2.0
"""The clock: deadlines, results' ages and logs of several hosts are compared by it."""

from __future__ import annotations

import ctypes
import time

from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Finding, Skipped, ok, warning
from gpuinfer.doctor.host import Host

#: adjtimex(2): the answer of an unsynchronised clock, and sizes of its structure on 64 bits.
_TIME_ERROR = 5
_TIMEX_BYTES, _MAXERROR_OFFSET = 208, 24
_MAX_SKEW_S = 1.0


def synchronised(_: Host) -> Finding:
    """The kernel knows its clock to be synchronised, by NTP or from the host of a virtual machine."""
    state, error_us = _adjtimex()
    if state == _TIME_ERROR:
        return warning(
            "the clock is not synchronised: deadlines and logs of several hosts will not agree",
            "timedatectl set-ntp true || apt install systemd-timesyncd",
        )
    return ok(f"the clock is synchronised, to within {error_us / 1000:.0f} ms")


def _adjtimex() -> tuple[int, int]:
    """Ask the kernel, changing nothing (modes = 0): (state, maximal error in microseconds)."""
    libc, buffer = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(_TIMEX_BYTES)
    state = libc.adjtimex(buffer)
    if state < 0:
        raise Skipped("the kernel does not tell (adjtimex is refused here)")
    return state, ctypes.c_long.from_buffer(buffer, _MAXERROR_OFFSET).value


def against_redis(host: Host) -> Finding:
    """This host's clock and that of Redis's host agree."""
    with asked(host) as client:
        before = time.time()
        seconds, microseconds = client.time()
        after = time.time()
    skew = seconds + microseconds / 1e6 - (before + after) / 2
    if abs(skew) > _MAX_SKEW_S + (after - before):
        return warning(
            f"Redis's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this host's: "
            "expiry times of tasks are off by that",
            "timedatectl set-ntp true && timedatectl status  # on both hosts",
        )
    return ok("this host's clock agrees with Redis's")
