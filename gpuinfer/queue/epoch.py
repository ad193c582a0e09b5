# SPDX-License-Identifier: Apache-2.0
"""The epochs of a worker's name: who may claim under it, and who was replaced.

A claim carries its epoch's number, and Redis refuses it in a later one. So a process that was taken for dead,
or whose name another one has taken, finds that out before it owns anything.
"""

from __future__ import annotations

import redis

from gpuinfer.errors import TakenBack, WorkerRunning
from gpuinfer.queue import keys
from gpuinfer.queue.format import mismatch
from gpuinfer.queue.scripts import bind

#: How many sequence ids an epoch has: 2^29 epochs of them stay exact in Lua's numbers.
SEQS_OF_AN_EPOCH = 2**24
#: How ``by`` begins when a reaper has begun an epoch: the worker it took for dead may go on.
REAPER = "reaper"


class Epoch:
    """The epoch that one process has begun under a worker's name, and the one Redis has counted."""

    def __init__(self, client: redis.Redis, worker: str, by: str) -> None:
        self._client = client
        self._worker = worker
        self._key = keys.epoch(worker)
        self._begin = bind(client, "epoch")
        #: Tells this process from others of the worker's name.
        self.by = by
        #: 0: none was begun here.
        self.number = 0

    def begin(self) -> None:
        """Begin the next epoch. Raises redis-py's errors, and what ``explain`` returns."""
        try:
            self.number = int(self._begin(keys=[self._key], args=[self.number, self.by]))
        except (redis.ConnectionError, redis.TimeoutError):
            self.number += bool(self.number)  # may have been counted; if it arrives later, Redis refuses it
            raise
        except redis.ResponseError as exc:
            raise self.explain(exc) from exc

    def follow_reaper(self) -> None:
        """Take over the number of a reaper's epoch. Raises WorkerRunning if another process began it."""
        number = int(self._client.hget(self._key, "number") or 0)
        if not self._begun_by().startswith((REAPER, self.by)):
            raise self._taken_over()
        self.number = number

    def explain(self, error: redis.ResponseError) -> Exception:
        """Return what the error of a script means: FormatMismatch, TakenBack, WorkerRunning, or itself."""
        text = str(error)
        if "FORMAT " in text:
            return mismatch(text.rpartition("FORMAT ")[2])
        if "STALE" not in text:
            return error
        by = self._begun_by()
        if by.startswith(REAPER):
            return TakenBack(f"{self._worker} was taken for dead, and its tasks were put back by the {by}")
        return self._taken_over()

    def _begun_by(self) -> str:
        found: bytes | None = self._client.hget(self._key, "by")  # type: ignore[assignment]  # not decoded
        return (found or b"").decode(errors="replace")

    def _taken_over(self) -> WorkerRunning:
        return WorkerRunning(
            f"another worker called {self._worker} has taken over; names must differ between hosts"
        )
