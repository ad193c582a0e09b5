# SPDX-License-Identifier: Apache-2.0
"""Counts this process's requests by key and model, for usage reports and metrics.

Counts are kept in memory and sent to Redis once a second, and at the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.types import Scope

from gpuinfer.errors import GpuinferError, UnknownModel
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.tally import FLUSH_EVERY_S, Tally

#: Scope keys of the request's model and of its body's size in bytes.
MODEL, RECEIVED = "gpuinfer.model", "gpuinfer.received"
#: Scope key of the caller (``access.Caller``); absent if it was not identified.
CALLER = "gpuinfer.caller"
#: Codes of refusals for lack of capacity or workers; the client may retry.
_REFUSED = (429, 503)
_KINDS = ("requests", "errors", "refused", "bytes_in", "bytes_out")

#: Runs the ``account`` script.
Flush = Callable[[list[Argument]], Awaitable[object]]


class Accounts:
    """The counts of one process. For its event loop."""

    def __init__(self, tally: Tally | None = None) -> None:
        self._tally = tally or Tally()
        #: (key, model) -> one total per kind.
        self._rows: dict[tuple[str, str], list[int]] = {}
        self._statuses: dict[int, int] = {}
        self._codes: dict[str, int] = {}

    def add(self, scope: Scope, status: int, sent: int, code: str | None) -> None:
        """Count an answered request: ``sent`` bytes, ``code`` of its error."""
        who = scope.get(CALLER)
        model = scope.get(MODEL) or ""
        if code is not None:
            self._codes[code] = self._codes.get(code, 0) + 1
            if code == UnknownModel.code:
                model = ""  # a name made up by the client
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
        """Move the counts to the tally."""
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
        """Flush once a second until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            with suppress(GpuinferError):  # requests report it, and the next flush sends the same counts
                await self.flush(flush)

    async def flush(self, flush: Flush) -> None:
        """Send new counts to Redis. Raises BrokerError."""
        tally = self.gather()
        if tally.dirty:
            await flush(tally.args())
            tally.confirm()
