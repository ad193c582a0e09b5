# SPDX-License-Identifier: Apache-2.0
"""How a worker reports to the fleet: that it is alive, what it serves, and what inputs its models take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import redis

from gpuinfer.queue import keys
from gpuinfer.queue.scripts import bind

#: Seconds after which a worker describes its models again, well within ``keys.SIGNATURE_VOID_S``.
DESCRIBE_EVERY_S = 30.0


class Membership:
    """One worker's entry in the fleet."""

    def __init__(
        self, client: redis.Redis, worker: str, models: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self._worker = worker
        self._models = tuple(models)
        self._clock = clock
        self._register = bind(client, "register")
        self._describe_script = bind(client, "describe")
        self._leave = bind(client, "leave")
        #: Model -> its signature as JSON, by which clients check inputs.
        self.signatures: Mapping[str, bytes] = {}
        self._described_at = 0.0
        #: The group that was registered (``keys.group_of``); empty: none, or Redis may have forgotten it.
        self.group = ""

    def register(self, group: str, tiers: str, heartbeat: bytes, default: str) -> int:
        """Report that this worker is alive and serves these tiers; return how many tasks wait for it.

        ``default`` becomes the default model if there is none yet. Raises redis-py's errors.
        """
        args = (self._worker, group, heartbeat, tiers, default, *self._models)
        waiting = int(self._register(keys=[keys.heartbeat(self._worker)], args=args))
        if self.group != group or self._clock() - self._described_at > DESCRIBE_EVERY_S:
            self._describe()
        self.group = group
        return waiting

    def _describe(self) -> None:
        """Report the models' signatures."""
        if self.signatures:
            said = [part for pair in self.signatures.items() for part in pair]
            self._describe_script(args=[self._worker, *said])
        self._described_at = self._clock()

    def leave(self, group: str) -> None:
        """Leave the fleet: this worker is no longer woken, and no longer counts as alive.

        Raises redis-py's errors.
        """
        self._leave(
            keys=[keys.heartbeat(self._worker), keys.inflight(self._worker)], args=[self._worker, group]
        )
