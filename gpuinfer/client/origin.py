# SPDX-License-Identifier: Apache-2.0
"""Which client process made a task: the ids it gives, and the channel on which it hears of their ends."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from gpuinfer.queue import keys

#: Seconds after which a process that submits says again whose ids it makes.
TELL_EVERY_S = 3600


class Origin:
    """What one client process puts into its messages: where it hears of their ends, and ids of its own.

    Ids are UUIDs whose first 48 bits are the process's, so that it knows its own without keeping them. The
    other 74 are random.
    """

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random
        self.pid = os.getpid()
        prefix = random(6).hex()
        self.prefix = prefix
        self._start = f"{prefix[:8]}-{prefix[8:]}-4"
        self.channel = keys.REPLY_PREFIX + prefix
        self._told_at = -math.inf

    def new_id(self) -> str:
        """Return the id of a new task."""
        digits = self._random(10).hex()  # uuid.UUID takes three times as long
        return f"{self._start}{digits[:3]}-{_VARIANT[digits[3]]}{digits[4:7]}-{digits[7:19]}"

    def made(self, task_id: str) -> bool:
        """Tell whether a task came from this process: its end is told on the reply channel."""
        return self.prefix == prefix_of(task_id)

    def to_tell(self) -> bool:
        """Tell whether Redis is to be told of this process now, before a submission: at first, and each hour.

        With that any other process knows a task of this one's that has expired. It is taken for told then.
        """
        now = time.monotonic()
        if now - self._told_at < TELL_EVERY_S:
            return False
        self._told_at = now
        return True

    def tell_again(self) -> None:
        """It could not be told."""
        self._told_at = -math.inf


#: A random hex digit -> one with the variant of a UUID in its two highest bits.
_VARIANT = {f"{digit:x}": "89ab"[digit & 3] for digit in range(16)}


def prefix_of(task_id: str) -> str:
    """Return the prefix of the client process that made an id; for another's it is nobody's."""
    return task_id[:8] + task_id[9:13]


def reply_channel(task_id: str) -> str:
    """Return the reply channel of the client process that made an id; nobody listens there for another's."""
    return keys.REPLY_PREFIX + prefix_of(task_id)
