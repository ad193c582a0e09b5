# SPDX-License-Identifier: Apache-2.0
"""The position of a waiting task in its list, from two numbers: tasks claimed from the list, and its length.

The task's state has both numbers as of its submission. They tell its position as long as the list is served
in order and no task is removed. Tasks of higher priority still go first, and other callers' tasks take turns
with it, so the position is an estimate; it is never larger than the list.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuinfer.queue.keys import list_key, ours, queue_name
from gpuinfer.queue.resource import Place
from gpuinfer.queue.results import TaskStatus


class Spot(NamedTuple):
    """What a waiting task's state says about its place."""

    #: Its list; ``counter``: the field of ``keys.CLAIMED`` that counts the tasks claimed from the list.
    list: str
    counter: str
    #: The counter's value when the task was submitted; None: not known.
    claimed: int | None
    #: How many tasks had to be claimed since then, including this one.
    ahead: int
    #: When it was submitted, in seconds since the epoch; None: not known.
    sent_at: float | None

    def place(self, length: int, claimed: int, now: float) -> Place:
        """Return its place. ``length``: the list's current length; ``claimed``: the counter's current value.

        The start is estimated from how fast the list was served since the submission; None while no task of
        it was claimed.
        """
        served = 0 if self.claimed is None else claimed - self.claimed
        position = max(0, min(self.ahead - served, length))
        if self.sent_at is None or served <= 0 or now <= self.sent_at:
            return Place(position)
        return Place(position, now + position * (now - self.sent_at) / served)


def spot_of(status: TaskStatus) -> Spot | None:
    """Return what a task's state says about its place; None if it waits in no list, or if that is unknown."""
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
