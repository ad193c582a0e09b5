# SPDX-License-Identifier: Apache-2.0
"""How fast tasks arrive, how fast a worker serves, and how long it takes to start, as measured.

A worker's rate shows only while the fleet is saturated: every worker is busy and holds about as many tasks as
workers held at most within the window (full batches), and more tasks wait than are in flight. Otherwise
throughput is only a lower bound: it may raise the estimate, and never lowers it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, median

from gpuinfer.queue.depth import Lane
from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.load import Load
from gpuinfer.watcher.state import Figures

#: The steady arrival rate is the mean over the cooldown, within these bounds.
WINDOW_MIN_S, WINDOW_MAX_S = 10.0, 60.0
#: The recent rate is taken from this many probes; an odd number, for the median.
RECENT_PROBES = 7
#: A rate that rose at this many probes in a row is expected to go on; a burst is over before.
RISING_PROBES = 4
#: Workers that are saturated at this many probes in a row are taken not to keep up.
SURE_PROBES = 2
#: A throughput counts when it was held for this many probes.
SHOWN_PROBES = 9
#: What was measured in saturation fades with this time constant.
FADE_S = 30.0
#: The assumed rate weighs as much as one worker-second of measurement.
PRIOR_WORKER_S = 1.0
#: The least rate: it is a divisor, even after hours in which nothing was served.
LEAST_RATE = 1e-6
#: Share of a new start-up time in the running mean.
STARTUP_SHARE = 0.3
#: A fleet is saturated when its workers hold this share of the most they held within the window.
FULL = 0.75
#: A probe after a longer pause, in probe intervals, measures nothing.
MAX_GAP = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What happened between two probes."""

    at: float
    seconds: float
    #: Tasks that arrived, one number a queue, in the order of QUEUES.
    arrived: tuple[float, ...]
    served: float
    #: Workers that served all the time; 0 when their number has changed.
    workers: int
    #: Tasks that a worker held at the end, on average.
    held: float

    @property
    def worker_s(self) -> float:
        """Return the worker-seconds that were spent."""
        return self.workers * self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What has been measured so far; every value may be None or empty before the first probe."""

    at: float | None = None
    #: waiting + in flight + done of each lane at the last probe.
    totals: Mapping[Lane, float] = field(default_factory=dict)
    done: float = 0.0
    active: int = 0
    #: At how many probes in a row the workers have been saturated.
    saturated: int = 0
    samples: tuple[Sample, ...] = ()
    #: Tasks served and worker-seconds spent in saturation, both fading.
    served: float | None = None
    worked: float = PRIOR_WORKER_S
    #: True once workers were saturated; before, the rate is a lower bound.
    known: bool = False
    startup_s: float | None = None

    def service(self, settings: WatcherSettings) -> float:
        """Return tasks a second of one worker: measured, or assumed before that."""
        return settings.assumed_rate if self.served is None else max(LEAST_RATE, self.served / self.worked)

    def startup(self, settings: WatcherSettings) -> float:
        """Return the seconds from start to ready: measured, or assumed before that."""
        return settings.assumed_startup_s if self.startup_s is None else self.startup_s

    @property
    def figures(self) -> Figures:
        """Return what the other hosts' watchers are told."""
        return Figures(served=self.served, worked=self.worked, known=self.known, startup_s=self.startup_s)

    def pooled(self, others: Iterable[Figures]) -> Rates:
        """Return these rates with the figures of all watchers, so that all decide from the same figures.

        All measure the same queues, and each its own starts. Rates from a saturated fleet count before lower
        bounds.
        """
        told = [self.figures, *others]
        startups = [one.startup_s for one in told if one.startup_s is not None]
        shown = [(one.known, one.served, one.worked) for one in told if one.served is not None]
        if not any(known for known, _, _ in shown):
            shown = [max(shown, key=lambda one: one[1] / one[2])] if shown else []
        surest = [one for one in shown if one[0]] or shown
        return replace(
            self,
            served=sum(served for _, served, _ in surest) if surest else None,
            worked=sum(worked for _, _, worked in surest) if surest else self.worked,
            known=any(known for known, _, _ in surest),
            startup_s=fmean(startups) if startups else None,
        )

    @property
    def arrived(self) -> float:
        """Return how many tasks arrived within the window."""
        return sum(sum(sample.arrived) for sample in self.samples)

    @property
    def peak(self) -> float:
        """Return the most tasks that a worker held within the window, on average over the fleet."""
        return max((sample.held for sample in self.samples), default=0.0)

    @property
    def steady(self) -> float:
        """Return arrivals a second of all queues over the whole window."""
        seconds = sum(sample.seconds for sample in self.samples)
        return self.arrived / max(seconds, WINDOW_MIN_S)

    @property
    def recent(self) -> tuple[float, ...]:
        """Return arrivals a second by queue, as expected to go on: the lower of median and mean.

        One burst does not move the median, and regular lumps do not move the mean. Probes that are missing,
        after a start or while Redis was away, count as zero: else the first burst would be a rate.
        """
        probes = [tuple(n / one.seconds for n in one.arrived) for one in self.samples[-RECENT_PROBES:]]
        if not probes:
            return (0.0,) * len(QUEUES)
        missing = (0.0,) * (RECENT_PROBES - len(probes))
        by_queue = (missing + values for values in zip(*probes, strict=True))
        return tuple(_lasting(values, self.saturated >= SURE_PROBES) for values in by_queue)


def _lasting(rates: tuple[float, ...], saturated: bool) -> float:
    """Return the expected rate. One that rose at each of the last probes rises as much again."""
    last = rates[-RISING_PROBES:]
    if saturated and len(last) == RISING_PROBES and all(a < b for a, b in pairwise(last)):
        return 2 * last[-1] - last[0]
    return min(median(rates), fmean(rates))


def measure(
    before: Rates, load: Load, active: int, all_busy: bool, settings: WatcherSettings, now: float
) -> Rates:
    """Return the rates after a probe. ``active``: how many workers serve; ``all_busy``: none is idle."""
    done = float(load.whole.done)
    held = load.held / active if active else 0.0
    backlog = load.whole.waiting > load.whole.in_flight
    full = all_busy and active > 0 and backlog and held >= FULL * max(before.peak, held)
    saturated = before.saturated + 1 if full else 0
    after = replace(before, at=now, totals=load.totals, done=done, active=active, saturated=saturated)
    seconds = now - before.at if before.at is not None else 0.0
    if not 0 < seconds <= MAX_GAP * settings.probe_interval_s:
        return after
    sample = Sample(
        at=now,
        seconds=seconds,
        arrived=_arrived(before.totals, load.totals),
        served=max(0.0, done - before.done),
        workers=active if active == before.active else 0,
        held=held,
    )
    window_s = min(WINDOW_MAX_S, max(WINDOW_MIN_S, settings.cooldown_s))
    kept = tuple(old for old in before.samples if old.at > now - window_s)
    after = replace(after, samples=(*kept, sample))
    if saturated > 1 and active == before.active:
        return _learn(after, sample, settings)
    return _raise(after, settings)


def _arrived(before: Mapping[Lane, float], totals: Mapping[Lane, float]) -> tuple[float, ...]:
    """Return how many tasks have arrived in each tier. A new lane counts from the next probe on."""
    tiers: dict[str, float] = dict.fromkeys(QUEUES, 0.0)
    for lane, total in totals.items():
        tiers[lane.tier] += total - before.get(lane, total)
    return tuple(max(0.0, count) for count in tiers.values())


def _learn(rates: Rates, sample: Sample, settings: WatcherSettings) -> Rates:
    """Take a saturated interval into the service rate."""
    served = settings.assumed_rate * rates.worked if rates.served is None else rates.served
    fade = math.exp(-sample.seconds / FADE_S)
    worked = rates.worked * fade + sample.worker_s
    return replace(rates, served=served * fade + sample.served, worked=worked, known=True)


def _raise(rates: Rates, settings: WatcherSettings) -> Rates:
    """Raise the rate to a higher throughput once the same workers have held it.

    While their number changes, some served tasks have no worker-seconds to be divided by.
    """
    probes = rates.samples[-SHOWN_PROBES:]
    steady = {one.workers for one in probes}
    if len(probes) < SHOWN_PROBES or len(steady) > 1 or 0 in steady:
        return rates
    shown = sum(one.served for one in probes) / sum(one.worker_s for one in probes)
    if shown <= rates.service(settings):
        return rates
    return replace(rates, served=shown * rates.worked)


def with_startups(rates: Rates, seconds: list[float]) -> Rates:
    """Take measured start-up times into the running mean."""
    mean = rates.startup_s
    for new in seconds:
        mean = new if mean is None else mean + STARTUP_SHARE * (new - mean)
    return replace(rates, startup_s=mean) if seconds else rates
