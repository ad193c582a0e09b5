# SPDX-License-Identifier: Apache-2.0
"""The lists that plain Celery producers may fill for a worker.

Our clients add each list that they fill to an index. A plain producer only pushes its message, so a worker
has to check these lists itself: those of its models, and the default model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import redis

from gpuinfer.queue import keys
from gpuinfer.queue.depth import Lane, is_paused
from gpuinfer.queue.direct import Direct

#: Seconds for which a key is skipped if it has a list's name but another type.
FOREIGN_S = 10.0


class PlainLists:
    """The lists that one worker checks: those that it serves, except paused ones and keys of another type."""

    def __init__(
        self, client: redis.Redis, direct: Direct, models: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._index = direct.bind("index")
        self._models = tuple(models)
        self._clock = clock
        self._tiers: Sequence[str] = ()
        self._default = ""
        #: The paused queues: the value of ``keys.PAUSED``.
        self._paused = b""
        #: Keys of another type: those skipped now, since when, and all that were reported.
        self._foreign: set[str] = set()
        self._foreign_at = 0.0
        self._reported: set[str] = set()
        #: The lists to check.
        self.names: list[str] = []

    def choose(self, tiers: Sequence[str], default: str) -> None:
        """Choose the lists of these tiers. ``default``: the default model; if empty, it is not known, and its
        lists are included.
        """
        self._tiers, self._default = tiers, default
        self._choose()

    def _choose(self) -> None:
        models = ("", *self._models) if self._default in ("", *self._models) else self._models
        self.names = [name for name in keys.lists(self._tiers, models) if self._open(name)]

    def _open(self, name: str) -> bool:
        place = keys.place_of(name)
        lane = Lane(place.tier, place.model or self._default)
        return name not in self._foreign and not is_paused(lane, self._paused.decode().split())

    def update(self, paused: bytes) -> bool:
        """Set the paused queues, to the value of ``keys.PAUSED``; return True if they changed."""
        changed = paused != self._paused
        expired = bool(self._foreign) and self._clock() - self._foreign_at > FOREIGN_S
        if expired:
            self._foreign = set()
        if changed or expired:
            self._paused = paused
            self._choose()
        return changed

    def index(self) -> int:
        """Add the lists that have tasks to the index; return how many lists have tasks."""
        return int(self._index(keys=self.names, args=()))

    def foreign(self) -> dict[str, str]:
        """Return name -> type of the keys that are not lists; each is returned only once.

        They are skipped for ``FOREIGN_S``. Raises redis-py's errors.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for name in self.names:
                pipe.type(name)
            kinds = [kind.decode() for kind in pipe.execute()]
        found = {
            name: kind for name, kind in zip(self.names, kinds, strict=True) if kind not in ("list", "none")
        }
        new = {name: kind for name, kind in found.items() if name not in self._reported}
        self._foreign |= found.keys()
        self._reported |= found.keys()
        self._foreign_at = self._clock()
        self._choose()
        return new
