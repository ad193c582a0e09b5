# SPDX-License-Identifier: Apache-2.0
"""When a worker may be stopped: after a cooldown, which grows each time a stop proved premature.

As many workers stay as were needed at most within the last ``cooldown_s`` seconds. A start within
``cooldown_max_s`` of a stop shows that the cooldown was too short, and doubles it: a load that comes and goes
faster than that is served, after a few rounds, by workers that stay. The cooldown is halved only after a long
time in which half of it would have stopped nothing that was needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.rates import MAX_GAP
from gpuinfer.watcher.state import Need, Verdict

#: After this many cooldowns of which half would have been enough, it is halved.
FORGIVE = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooldown:
    """What was needed lately, and how long the cooldown is."""

    #: (when, how many) within the last cooldown.
    needs: tuple[tuple[float, int], ...] = ()
    #: Since when there was no gap between probes: nothing is stopped before a whole cooldown.
    since: float | None = None
    seen_at: float = 0.0
    #: How long it is; None: as in the settings.
    period_s: float | None = None
    #: When it was changed, or last proved no longer than necessary.
    changed_at: float = 0.0
    last_up: float | None = None
    #: The last stop that no start has followed yet.
    last_down: float | None = None

    def length(self, settings: WatcherSettings) -> float:
        """Return the cooldown in seconds."""
        period = settings.cooldown_s if self.period_s is None else self.period_s
        return min(max(period, settings.cooldown_s), settings.cooldown_max_s)

    def observe(
        self, running: int, need: Need, settings: WatcherSettings, now: float
    ) -> tuple[Cooldown, int]:
        """Note what is needed; return how many of the running have not been needed for a whole cooldown."""
        gap = now - self.seen_at > MAX_GAP * settings.probe_interval_s
        fresh = self.since is None or gap or now < self.seen_at
        since = now if fresh or self.since is None else self.since
        length = self.length(settings)
        wanted = max(need.minimum, need.desired if need.desired > running else 0)
        # Half the cooldown would have stopped a worker that is needed now.
        due = not fresh and _most(self.needs, now - length / 2) < min(wanted, running)
        kept = () if fresh else tuple(pair for pair in self.needs if pair[0] >= now - length)
        needs = (*kept, (now, wanted))
        changed_at = now if due else self.changed_at
        after = replace(self, needs=needs, since=since, seen_at=now, changed_at=changed_at)
        over = now - since >= length
        return after, max(0, running - _most(needs, now - length)) if over else 0

    def after(self, verdict: Verdict, settings: WatcherSettings, now: float) -> Cooldown:
        """Note what was decided; lengthen or shorten the cooldown."""
        length = self.length(settings)
        if verdict == "scale_up":
            premature = self.last_down is not None and now - self.last_down < settings.cooldown_max_s
            after = replace(self, last_up=now, last_down=None)
            return replace(after, period_s=2 * length, changed_at=now) if premature else after
        after = replace(self, last_down=now) if verdict == "scale_down" else self
        if self.period_s is not None and now - self.changed_at > FORGIVE * length:
            shorter = None if length <= settings.cooldown_s else length / 2
            return replace(after, period_s=shorter, changed_at=now)
        return after


def _most(needs: tuple[tuple[float, int], ...], begin: float) -> int:
    """Return the most that was needed since ``begin``, or else at the last probe."""
    return max((wanted for at, wanted in needs if at >= begin), default=needs[-1][1])
