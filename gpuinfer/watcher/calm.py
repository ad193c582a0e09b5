# SPDX-License-Identifier: Apache-2.0
"""When a worker may be stopped: after a calm period, which grows each time a stop proved rash.

The most that was needed within the last ``calm`` seconds stays. A start that follows a stop within
``calm_max_s`` shows that the period was too short: it doubles. A load that comes and goes faster than
``calm_max_s`` is so met by workers that stay, after a few rounds, and nothing flaps for ever: the period
is halved again only after a long time in which half of it would have stopped nothing that was needed later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.rates import MAX_GAP
from gpuinfer.watcher.state import Need, Verdict

#: After this many calm periods in which half of the period would have been enough, it is halved.
FORGIVE = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calm:
    """What was needed lately, and what became of stops."""

    #: (when, how many), the number falling from first to last: the first is the most of the window.
    needs: tuple[tuple[float, int], ...] = ()
    #: When looking began without a gap; there is no calm before a whole period was seen.
    since: float | None = None
    seen_at: float = 0.0
    #: The period; None: as in the settings.
    period_s: float | None = None
    #: When it was changed, or last proved to be no longer than it must be.
    changed_at: float = 0.0
    last_up: float | None = None
    #: The last stop that no start has followed yet.
    last_down: float | None = None

    def pause(self, settings: WatcherSettings) -> float:
        """Return the calm period in seconds."""
        period = settings.calm_s if self.period_s is None else self.period_s
        return min(max(period, settings.calm_s), settings.calm_max_s)

    def look(self, running: int, need: Need, settings: WatcherSettings, now: float) -> tuple[Calm, int]:
        """Note what is needed; return how many of those that run have not been needed for long."""
        gap = now - self.seen_at > MAX_GAP * settings.probe_interval_s
        fresh = self.since is None or gap or now < self.seen_at
        since = now if fresh or self.since is None else self.since
        pause = self.pause(settings)
        wanted = max(need.enough, need.up if need.up > running else 0)
        # Half the period would have stopped what is needed now.
        due = not fresh and _most(self.needs, now - pause / 2) < min(wanted, running)
        kept = () if fresh else _window(self.needs, wanted, now - pause)
        after = replace(self, needs=(*kept, (now, wanted)), since=since, seen_at=now)
        after = replace(after, changed_at=now) if due else after
        calm = now - since >= pause
        return after, max(0, running - after.needs[0][1]) if calm else 0

    def after(self, verdict: Verdict, settings: WatcherSettings, now: float) -> Calm:
        """Note what was decided; lengthen or shorten the period."""
        pause = self.pause(settings)
        if verdict == "scale_up":
            rash = self.last_down is not None and now - self.last_down < settings.calm_max_s
            after = replace(self, last_up=now, last_down=None)
            return replace(after, period_s=2 * pause, changed_at=now) if rash else after
        after = replace(self, last_down=now) if verdict == "scale_down" else self
        if self.period_s is not None and now - self.changed_at > FORGIVE * pause:
            shorter = None if pause <= settings.calm_s else pause / 2
            return replace(after, period_s=shorter, changed_at=now)
        return after


def _most(needs: tuple[tuple[float, int], ...], begin: float) -> int:
    """Return the most that was needed since ``begin``, or at the last look where that was before."""
    return next((wanted for at, wanted in needs if at >= begin), needs[-1][1])


def _window(needs: tuple[tuple[float, int], ...], wanted: int, begin: float) -> tuple[tuple[float, int], ...]:
    """Drop what is too old, and what the newest look exceeds: it can never be the most again."""
    return tuple(pair for pair in needs if pair[0] >= begin and pair[1] > wanted)
