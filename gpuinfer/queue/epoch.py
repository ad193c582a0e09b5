# SPDX-License-Identifier: Apache-2.0
"""The epochs of a worker's name: which process may claim under it.

Each claim carries the number of its epoch, and Redis refuses a claim of any epoch before the current one. So
a process that was taken for dead, or whose name another process now uses, learns that before it owns a task.
"""

from __future__ import annotations

import redis

from gpuinfer.errors import TakenBack, WorkerRunning
from gpuinfer.queue import keys
from gpuinfer.queue.format import mismatch
from gpuinfer.queue.scripts import bind

#: Sequence ids per epoch. Lua's numbers are exact for 2^29 epochs.
SEQS_OF_AN_EPOCH = 2**24
#: Prefix of ``by`` in an epoch begun by a reaper: the worker that it took for dead may continue.
REAPER = "reaper"


class Epoch:
    """The epoch that this process began under a worker's name, compared with Redis's current one."""

    def __init__(self, client: redis.Redis, worker: str, by: str) -> None:
        self._client = client
        self._worker = worker
        self._key = keys.epoch(worker)
        self._begin = bind(client, "epoch")
        #: Identifies this process among those that use the worker's name.
        self.by = by
        #: 0: this process has begun none.
        self.number = 0

    def begin(self) -> None:
        """Begin the next epoch. Raises redis-py's errors, and what ``explain`` returns."""
        try:
            self.number = int(self._begin(keys=[self._key], args=[self.number, self.by]))
        except (redis.ConnectionError, redis.TimeoutError):
            self.number += bool(self.number)  # Redis may have counted it; if not yet, it will refuse the call
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
        """Return a script's error as FormatMismatch, TakenBack or WorkerRunning; any other as it is."""
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
