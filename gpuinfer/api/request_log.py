# SPDX-License-Identifier: Apache-2.0
"""What the front's log tells of requests: trouble when it begins and ends, the rest in numbers.

A request that succeeds is counted; a line a minute has the counts. What the host could not do (429 and
5xx), and who was not let in (401 and 403), is an episode a code: a warning when it begins, one a minute while
it lasts, one when it has ended, and one for each further reason, up to ``NAMED_REASONS``.
What a client did wrong (other 4xx) is a line at info, up to ``NAMED_MISTAKES`` a minute; the rest is counted.
With ``log.requests = "all"`` each request that succeeds has its own line, too.
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
#: Seconds without a refused request after which an episode has ended.
QUIET_S = 10.0
#: Requests that a client got wrong, a minute, that have a line of their own.
NAMED_MISTAKES = 20
#: Reasons of one episode that have a line of their own.
NAMED_REASONS = 5


def is_episode(status: int) -> bool:
    """Tell whether an answer is told as a part of an episode."""
    return status >= 500 or status in (401, 403, 429)


def tell_one(action: str, seconds: float, fields: Mapping[str, Any]) -> None:
    """Write one request's line."""
    log.info(action, **fields, duration_ms=round(seconds * 1000, 2))


@dataclass(slots=True)
class _Episode:
    """Requests that could not be served for one reason."""

    began: float
    told: float
    last: float
    #: Requests since the last line, and in all.
    untold: int = 0
    total: int = 1
    reason: str = ""
    #: The reasons that have had a line.
    named: set[str] = field(default_factory=set)

    def is_news(self) -> bool:
        """Note the reason; tell whether it has had no line yet. Other numbers make no other reason."""
        kind = re.sub(r"\d+", "0", self.reason)
        if not kind or kind in self.named or len(self.named) >= NAMED_REASONS:
            return False
        self.named.add(kind)
        return True


@dataclass(slots=True)
class _Counts:
    """What is in the next line of counts."""

    since: float
    succeeded: int = 0
    accepted: int = 0
    mistakes: int = 0
    longest_s: float = 0.0


class RequestLog:
    """Writes what the front has to say of its requests: those of this process, and of others it is told of.

    ``said`` is ``log.requests``; ``tick`` is to be called at least once a second, ``close`` at the end.
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
        """Note a request that has succeeded; False: it is to have a line, so ``add`` it."""
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
        """Note a request that has been answered: ``fields`` are what its line would have."""
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
        """Note what another process has told of its requests, as ``relay.Told`` has it.

        With "all" the lines of single requests are written there.
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
        """Write the lines that are due."""
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
        """Write what has not been written."""
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
