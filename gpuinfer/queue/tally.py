# SPDX-License-Identifier: Apache-2.0
"""The counts of one process, which the script ``account`` adds to the sums in Redis once a second.

There are two kinds of sums. ``usage``, for accounts, is per UTC hour, key and model. ``counts``, for metrics,
is since this Redis began; a field is a kind and two names: ``device_us alice resnet``, ``status 202 -``,
``wait:3 realtime resnet`` (tasks whose waiting time is in bucket 3).

Each flush has a number, and Redis adds each number of a process only once. So a flush whose answer was lost
can be sent again without counting twice. A SIGKILL loses the counts since the last flush.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from gpuinfer.queue.direct import Argument

#: Upper bounds of the buckets for times (seconds) and for the inputs of batches; the last bucket has none.
TIMES_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0),
)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Seconds between two flushes.
FLUSH_EVERY_S = 1.0
#: Means no key, or no model.
NONE = "-"


def bucket(kind: str, number: int) -> str:
    """Return the kind under which a bucket is counted."""
    return f"{kind}:{number}"


@lru_cache(maxsize=1024)
def word(name: str) -> str:
    """Return a name as one word, for a field: a plain producer may use any text as a caller."""
    return "_".join(name[:64].split()) or NONE


class Tally:
    """The counts of one process that Redis does not have yet. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._process = secrets.token_hex(8)
        self._number = 0
        self._flushed_at = clock()
        self.usage: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        #: Keys that were used since the last flush.
        self.used: set[str] = set()
        #: The flush that was sent but not confirmed yet.
        self._pending: list[Argument] | None = None

    @property
    def elapsed(self) -> bool:
        """Whether it is time for a flush."""
        return self._clock() - self._flushed_at >= FLUSH_EVERY_S

    @property
    def dirty(self) -> bool:
        """Whether there are counts that Redis does not have yet."""
        return bool(self._pending or self.usage or self.counts or self.used)

    def use(self, kind: str, key: str, model: str, count: int) -> None:
        """Add to ``usage``."""
        field = f"{kind} {word(key)} {word(model)}"
        self.usage[field] = self.usage.get(field, 0) + count

    def count(self, kind: str, first: str = "", second: str = "", *, count: int = 1) -> None:
        """Add to ``counts``, under up to two names."""
        field = f"{kind} {word(first)} {word(second)}"
        self.counts[field] = self.counts.get(field, 0) + count

    def args(self) -> list[Argument]:
        """Return the arguments of the next flush; the same ones again until ``confirm`` is called."""
        self._flushed_at = self._clock()
        if self._pending is None:
            self._number += 1
            self._pending = [self._process, self._number, *_flat(self.usage), *_flat(self.counts), *self.used]
            self.usage, self.counts, self.used = {}, {}, set()
        return self._pending

    def confirm(self) -> None:
        """Note that Redis has the last flush."""
        self._pending = None


def _flat(counts: Mapping[str, int]) -> list[Any]:
    found: list[Any] = [len(counts)]
    for field, count in counts.items():
        found += (field, count)
    return found
