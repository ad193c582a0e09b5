# SPDX-License-Identifier: Apache-2.0
"""Where a task stands that waits, from two counters: the length of its list, and what was claimed from it.

Its state has what was claimed and what waited when it came. That tells its place as long as its list is
served in order, and nothing is taken out. Tasks of a higher priority go before it all the same, and other
callers' take turns with it: the position is an estimate, and no larger than its list.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuinfer.queue.keys import list_key, ours, queue_name
from gpuinfer.queue.resource import Place
from gpuinfer.queue.results import TaskStatus


class Spot(NamedTuple):
    """What a waiting task's state tells of its place."""

    #: The list it is in, and the field of ``keys.CLAIMED`` that counts what is claimed from it.
    list: str
    counter: str
    #: What was claimed when it came; None: not known.
    claimed: int | None
    #: How many were to be claimed since then, and it with them.
    ahead: int
    #: When it was submitted, in seconds since the epoch; None: not known.
    sent_at: float | None

    def place(self, length: int, claimed: int, now: float) -> Place:
        """Return its place. ``length``: of its list; ``claimed``: by its counter, now.

        When it begins is told from how fast its list was served since it came; None while nothing was.
        """
        served = 0 if self.claimed is None else claimed - self.claimed
        position = max(0, min(self.ahead - served, length))
        if self.sent_at is None or served <= 0 or now <= self.sent_at:
            return Place(position)
        return Place(position, now + position * (now - self.sent_at) / served)


def spot_of(status: TaskStatus) -> Spot | None:
    """Return what a task's state tells of its place; None where it waits in no list, or nothing is told."""
    about, place = status.about, status.about.get("place")
    if status.state != "queued" or not isinstance(place, list) or [type(one) for one in place] != [int] * 4:
        return None
    default, claimed, length, number = place
    tier, model = (str(about.get(name, "")) for name in ("queue", "model"))
    priority = about.get("priority", 0)
    if not number or type(priority) is not int or not 0 <= priority <= 9:
        return None
    name = list_key(queue_name(tier, "" if default else model, status.caller), priority)
    if not ours(name):
        return None
    sent = status.sent_at if isinstance(status.sent_at, float) else None
    counter = f"{name} {model}" if default and model else name
    return Spot(name, counter, claimed if claimed >= 0 else None, length + number, sent)
