# SPDX-License-Identifier: Apache-2.0
"""What one caller may submit: how fast, and how much of it may wait.

The script ``submit`` enforces it, by Redis's clock and by what is in Redis, so that it holds over all
processes and hosts that submit for the caller. The rate is a GCRA, as ``quota.lua`` tells.
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

#: Seconds without a refusal after which the next one begins a new spell.
QUIET_S = 60.0
#: Of a caller that has a rate and no burst: the seconds of its rate that it may submit at once. Over ten
#: seconds it gets 2.5 % more than its rate.
BURST_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """The bounds of one caller. 0: no bound."""

    #: Tasks a second, in the long run.
    rate: float = 0.0
    #: Tasks at once, after a pause; 0: those of a quarter of a second, one at least.
    burst: int = 0
    #: Tasks that may wait, those with an ETA among them, and their bytes, with those of large bodies until
    #: their tasks end.
    max_waiting: int = 0
    max_waiting_bytes: int = 0

    @property
    def at_once(self) -> int:
        """How many tasks the rate lets in at once; 0 without a rate."""
        return (self.burst or max(1, math.ceil(self.rate * BURST_S))) if self.rate > 0 else 0

    @property
    def text(self) -> str:
        """The bounds as the script takes them; empty for none."""
        if not (self.rate > 0 or self.max_waiting or self.max_waiting_bytes):
            return ""
        return f"{max(0.0, self.rate):.6f} {self.at_once} {self.max_waiting} {self.max_waiting_bytes}"


class Rate(NamedTuple):
    """How a caller stands after a submission."""

    #: Tasks that would be accepted now.
    remaining: int
    #: Seconds until the whole burst would be.
    reset_s: float


def weighing(weights: Mapping[str, float], found: Iterable[bytes]) -> list[list[str]]:
    """Return the commands that make these the weights. ``found``: the callers that have one now."""
    uneven = {caller: weight for caller, weight in weights.items() if weight > 0 and weight != 1}
    gone = [name for name in (one.decode(errors="replace") for one in found) if name not in uneven]
    commands = [["HDEL", WEIGHTS, *gone]] if gone else []
    if uneven:
        commands.append(["HSET", WEIGHTS, *(text for pair in uneven.items() for text in map(str, pair))])
    return commands


class Refusals:
    """Counts what callers are refused by their quotas; one line in the log says when that begins."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: (caller, code) -> how many tasks were refused, ever.
        self.counts: Counter[tuple[str, str]] = Counter()
        self._last: dict[tuple[str, str], float] = {}

    def note(self, caller: str, error: GpuinferError) -> None:
        """Note a refusal; of another kind of error, nothing."""
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
