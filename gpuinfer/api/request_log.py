# SPDX-License-Identifier: Apache-2.0
"""The API's request log: problems when they begin and end, everything else as counts.

Successful requests are counted, with one line per minute. Server errors and refusals (429, 5xx, 401, 403)
form one episode per error code: a warning at its beginning, one per minute while it lasts, one at its end,
and one for each new reason, up to ``NAMED_REASONS``. Client errors (other 4xx) get a line at info, up to
``NAMED_MISTAKES`` per minute; further ones are only counted. With ``log.requests = "all"`` each successful
request gets its own line, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpuinfer.log import get_logger

log = get_logger(__name__)

#: Seconds between two lines of counts, and between two warnings of one episode.
EVERY_S = 60.0
#: An episode ends after this many seconds without a refused request.
QUIET_S = 10.0
#: Maximum client errors per minute with their own line.
NAMED_MISTAKES = 20
#: Maximum reasons of one episode with their own line.
NAMED_REASONS = 5


def is_episode(status: int) -> bool:
    """Whether an answer with this status belongs to an episode."""
    return status >= 500 or status in (401, 403, 429)


def tell_one(action: str, seconds: float, fields: Mapping[str, Any]) -> None:
    """Write one request's line."""
    log.info(action, **fields, duration_ms=round(seconds * 1000, 2))


@dataclass(slots=True)
class _Episode:
    """Requests refused with one error code."""

    began: float
    told: float
    last: float
    #: Requests since the last line, and in total.
    untold: int = 0
    total: int = 1
    reason: str = ""
    #: Reasons already logged.
    named: set[str] = field(default_factory=set)

    def is_news(self) -> bool:
        """Record the reason; return whether it is new. Reasons that differ only in numbers are the same."""
        kind = re.sub(r"\d+", "0", self.reason)
        if not kind or kind in self.named or len(self.named) >= NAMED_REASONS:
            return False
        self.named.add(kind)
        return True


@dataclass(slots=True)
class _Counts:
    """Counts for the next line."""

    since: float
    succeeded: int = 0
    accepted: int = 0
    mistakes: int = 0
    longest_s: float = 0.0


class RequestLog:
    """Writes the request log of this process, and of its child processes.

    ``said``: ``log.requests``. Call ``tick`` at least once a second, and ``close`` at the end.
    """

    def __init__(
        self, said: Literal["trouble", "all"] = "trouble", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._all = said == "all"
        self._clock = clock
        self._counts = _Counts(clock())
        self._episodes: dict[str, _Episode] = {}
        self._mistakes_since, self._mistakes = clock(), 0

    def count(self, status: int, seconds: float) -> bool:
        """Count a successful request; if it returns False, call ``add``, as it needs a line."""
        if self._all:
            return False
        counts = self._counts
        if not (counts.succeeded or counts.mistakes):
            counts.since = self._clock()
        counts.succeeded += 1
        counts.accepted += status == 202
        if seconds > counts.longest_s:
            counts.longest_s = seconds
        return True

    def add(self, action: str, status: int, seconds: float, fields: dict[str, Any]) -> None:
        """Record an answered request. ``fields``: of its log line."""
        counts = self._counts
        if not (counts.succeeded or counts.mistakes):
            counts.since = self._clock()
        if is_episode(status):
            self._trouble(status, fields)
        elif status >= 400:
            self._mistake(action, seconds, fields)
        else:
            counts.succeeded += 1
            counts.accepted += status == 202
            counts.longest_s = max(counts.longest_s, seconds)
            if self._all:
                tell_one(action, seconds, fields)

    def _mistake(self, action: str, seconds: float, fields: dict[str, Any]) -> None:
        self._counts.mistakes += 1
        now = self._clock()
        if now - self._mistakes_since >= EVERY_S:
            self._mistakes_since, self._mistakes = now, 0
        self._mistakes += 1
        if self._all or self._mistakes <= NAMED_MISTAKES:
            tell_one(action, seconds, fields)

    def _trouble(self, status: int, fields: dict[str, Any]) -> None:
        now, code = self._clock(), str(fields.get("code") or status)
        reason = str(fields.get("reason") or "")
        episode = self._episodes.get(code)
        if episode is None:
            episode = self._episodes[code] = _Episode(now, now, now, reason=reason)
            episode.is_news()
            log.warning("requests_refused", **fields)
            return
        episode.last, episode.reason = now, reason or episode.reason
        episode.untold += 1
        episode.total += 1
        if reason and episode.is_news():
            self._tell_again(code, episode)

    def add_told(self, told: Mapping[str, Any]) -> None:
        """Record the requests of a child process, from a ``relay.Told``.

        With "all" the child itself logs its successful requests.
        """
        counts = self._counts
        if not (counts.succeeded or counts.mistakes):
            counts.since = self._clock()
        counts.succeeded += told["succeeded"]
        counts.accepted += told["accepted"]
        counts.mistakes += told["mistakes"] - len(told["named"])
        counts.longest_s = max(counts.longest_s, told["longest_s"])
        for action, seconds, fields in told["named"]:
            self._mistake(action, seconds, fields)
        for status, fields, count in told["troubles"]:
            for _ in range(count):
                self._trouble(status, fields)

    def tick(self) -> None:
        """Write lines that are due."""
        now = self._clock()
        counts = self._counts
        if (counts.succeeded or counts.mistakes) and now - counts.since >= EVERY_S:
            self._tell_counts()
        for code, episode in list(self._episodes.items()):
            if now - episode.last >= QUIET_S:
                self._tell_end(code)
            elif episode.untold and now - episode.told >= EVERY_S:
                self._tell_again(code, episode)

    def close(self) -> None:
        """Write everything not written yet."""
        if self._counts.succeeded or self._counts.mistakes:
            self._tell_counts()
        for code in list(self._episodes):
            self._tell_end(code)

    def _tell_counts(self) -> None:
        counts, now = self._counts, self._clock()
        log.info(
            "requests",
            succeeded=counts.succeeded,
            accepted=counts.accepted,
            mistakes=counts.mistakes,
            longest_ms=round(counts.longest_s * 1000, 2),
            seconds=round(now - counts.since),
        )
        self._counts = _Counts(now)

    def _tell_again(self, code: str, episode: _Episode) -> None:
        because = {"reason": episode.reason} if episode.reason else {}
        log.warning("requests_still_refused", code=code, count=episode.untold, **because)
        episode.told, episode.untold = self._clock(), 0

    def _tell_end(self, code: str) -> None:
        episode = self._episodes.pop(code)
        lasted = round(episode.last - episode.began, 1)
        log.warning("requests_refused_no_more", code=code, count=episode.total, lasted_s=lasted)
