# SPDX-License-Identifier: Apache-2.0
"""A caller's quota: how fast it may submit tasks, and how many of them may wait.

The script ``submit`` enforces it, with Redis's clock and data, so it holds over all processes and hosts that
submit for the caller. The rate limit is a GCRA, explained in ``quota.lua``.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gpuinfer.errors import GpuinferError, KeyQuota, RateLimited
from gpuinfer.queue.keys import WEIGHTS

log = logging.getLogger(__name__)

#: After this many seconds without a refusal, the next one is logged again.
QUIET_S = 60.0
#: Default burst of a caller with a rate: the tasks of this many seconds at its rate. Over ten seconds, the
#: caller can exceed its rate by 2.5 %.
BURST_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """The limits of one caller. 0: no limit."""

    #: Tasks per second, in the long run.
    rate: float = 0.0
    #: Tasks at once, after a pause; 0: the tasks of a quarter of a second, at least one.
    burst: int = 0
    #: Maximum waiting tasks, including those with an ETA, and their bytes. A large body counts until its task
    #: ends.
    max_waiting: int = 0
    max_waiting_bytes: int = 0

    @property
    def at_once(self) -> int:
        """Maximum tasks that may be submitted at once; 0 if there is no rate."""
        return (self.burst or max(1, math.ceil(self.rate * BURST_S))) if self.rate > 0 else 0

    @property
    def text(self) -> str:
        """The limits in the script's format; empty if there are none."""
        if not (self.rate > 0 or self.max_waiting or self.max_waiting_bytes):
            return ""
        return f"{max(0.0, self.rate):.6f} {self.at_once} {self.max_waiting} {self.max_waiting_bytes}"


class Rate(NamedTuple):
    """The state of a caller's rate limit after a submission."""

    #: Tasks that would be accepted now.
    remaining: int
    #: Seconds until a full burst would be accepted.
    reset_s: float


def weighing(weights: Mapping[str, float], found: Iterable[bytes]) -> list[list[str]]:
    """Return the Redis commands that set these weights. ``found``: the callers that have a weight now."""
    uneven = {caller: weight for caller, weight in weights.items() if weight > 0 and weight != 1}
    gone = [name for name in (one.decode(errors="replace") for one in found) if name not in uneven]
    commands = [["HDEL", WEIGHTS, *gone]] if gone else []
    if uneven:
        commands.append(["HSET", WEIGHTS, *(text for pair in uneven.items() for text in map(str, pair))])
    return commands


class Refusals:
    """Counts tasks refused by callers' quotas, and logs one line when refusals begin."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: (caller, code) -> how many tasks were refused, ever.
        self.counts: Counter[tuple[str, str]] = Counter()
        self._last: dict[tuple[str, str], float] = {}

    def note(self, caller: str, error: GpuinferError) -> None:
        """Count a refusal by quota, and log the first; ignore other errors."""
        if not isinstance(error, RateLimited | KeyQuota):
            return
        what, now = (caller, error.code), self._clock()
        self.counts[what] += 1
        if now - self._last.get(what, -math.inf) > QUIET_S:
            fields = {"caller": caller, "code": error.code, "reason": error.message}
            log.warning(
                "refused by the quota of %s: %s",
                caller,
                error.message,
                extra={"action": "quota_refused", "fields": fields},
            )
        self._last[what] = now
