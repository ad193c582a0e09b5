# SPDX-License-Identifier: Apache-2.0
"""What this process of the front counts of its requests, by key and model: for accounts and for metrics.

A request costs some additions; Redis hears of them once a second, and at the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.types import Scope

from gpuinfer.errors import GpuinferError, UnknownModel
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.tally import FLUSH_EVERY_S, Tally

#: Where a scope has the model that a request is for, and the bytes of its body.
MODEL, RECEIVED = "gpuinfer.model", "gpuinfer.received"
#: Where it has who sent it (``access.Caller``); absent where nobody asked.
CALLER = "gpuinfer.caller"
#: No room, or nobody to serve: what a client may try again.
_REFUSED = (429, 503)
_KINDS = ("requests", "errors", "refused", "bytes_in", "bytes_out")

#: Runs the script ``account``.
Flush = Callable[[list[Argument]], Awaitable[object]]


class Accounts:
    """The counts of one process. For its event loop."""

    def __init__(self, tally: Tally | None = None) -> None:
        self._tally = tally or Tally()
        #: Key and model -> a sum for each of the kinds.
        self._rows: dict[tuple[str, str], list[int]] = {}
        self._statuses: dict[int, int] = {}
        self._codes: dict[str, int] = {}

    def add(self, scope: Scope, status: int, sent: int, code: str | None) -> None:
        """Count a request that has been answered with ``sent`` bytes; ``code`` is its error's."""
        who = scope.get(CALLER)
        model = scope.get(MODEL) or ""
        if code is not None:
            self._codes[code] = self._codes.get(code, 0) + 1
            if code == UnknownModel.code:
                model = ""  # whatever somebody has made up
        place = (who.name if who is not None else "", model)
        row = self._rows.get(place)
        if row is None:
            row = self._rows[place] = [0, 0, 0, 0, 0]
        row[0] += 1
        row[3] += scope.get(RECEIVED, 0)
        row[4] += sent
        if status >= 400:
            row[2 if status in _REFUSED else 1] += 1
        self._statuses[status] = self._statuses.get(status, 0) + 1

    def gather(self) -> Tally:
        """Move what was counted into the tally."""
        tally = self._tally
        for (key, model), row in self._rows.items():
            if key:
                tally.used.add(key)
            for kind, count in zip(_KINDS, row, strict=True):
                if count:
                    tally.use(kind, key, model, count)
        for status, count in self._statuses.items():
            tally.count("status", str(status), count=count)
        for code, count in self._codes.items():
            tally.count("error", code, count=count)
        self._rows, self._statuses, self._codes = {}, {}, {}
        return tally

    async def keep_flushing(self, flush: Flush) -> None:
        """Flush once a second, until it is cancelled."""
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            with suppress(GpuinferError):  # requests say that Redis is away; the same flush is sent again
                await self.flush(flush)

    async def flush(self, flush: Flush) -> None:
        """Tell Redis what it lacks. Raises BrokerError."""
        tally = self.gather()
        if tally.dirty:
            await flush(tally.args())
            tally.confirm()
