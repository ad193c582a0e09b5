# SPDX-License-Identifier: Apache-2.0
"""The client process that made a task: the ids that it gives, and the channel for the ends of its tasks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from gpuinfer.queue import keys

#: Seconds after which a process that submits writes its ids' prefix to Redis again.
TELL_EVERY_S = 3600


class Origin:
    """One client process: it makes task ids, and has a reply channel.

    Ids are UUIDs. The first 48 bits are the same for all tasks of a process, so that it recognises them
    without a list. The other 74 are random.
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
        """Tell whether this process made a task's id: its end is published on the reply channel."""
        return self.prefix == prefix_of(task_id)

    def to_tell(self) -> bool:
        """Tell whether to write the prefix to Redis now: before the first submission, and each hour.

        By the prefix, other processes can tell an expired task of this one from an unknown id. After True,
        the prefix counts as written.
        """
        now = time.monotonic()
        if now - self._told_at < TELL_EVERY_S:
            return False
        self._told_at = now
        return True

    def tell_again(self) -> None:
        """Note that the prefix could not be written."""
        self._told_at = -math.inf


#: A random hex digit -> one with the variant of a UUID in its two highest bits.
_VARIANT = {f"{digit:x}": "89ab"[digit & 3] for digit in range(16)}


def prefix_of(task_id: str) -> str:
    """Return the prefix of the process that made an id; for any other id, a prefix that no process has."""
    return task_id[:8] + task_id[9:13]


def reply_channel(task_id: str) -> str:
    """Return the reply channel of the process that made an id; for any other id, one without listeners."""
    return keys.REPLY_PREFIX + prefix_of(task_id)
