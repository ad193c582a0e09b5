# SPDX-License-Identifier: Apache-2.0
"""How many workers a demand needs: the formulas.

Each worker serves μ tasks a second, a start takes S seconds, and the target of a queue is T. A worker that is
started now helps only after S, so the backlog Q and what keeps arriving (λ a second) are to be served by
H = S + T. What is missing then, ``short = Q + λH - μ·(worker-seconds until H)``, is the work of
``short / (μT)`` more workers, each of which has T seconds for it. For each queue, Q includes the more urgent
queues, which go first, and tasks that fall due within S.

A steady load needs λ / (μ·u) workers, where u is the target utilisation. Workers are started only while those
that run would be busier than u + 0.1, and stopped only if the rest would not be busier than u - 0.1: a
constant load settles at one number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpuinfer.plural import tasks_wait
from gpuinfer.settings import QUEUES, QueueName, WatcherSettings
from gpuinfer.watcher.cooldown import Cooldown
from gpuinfer.watcher.fleet import Fleet
from gpuinfer.watcher.load import Load
from gpuinfer.watcher.rates import SURE_PROBES, Rates
from gpuinfer.watcher.state import Need

#: How far utilisation may be above or below its target before a worker is started or stopped.
SLACK = 0.1
#: A start that takes this many times as long as usual is not counted on.
STUCK = 3.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many workers run at least and at most; most 0: no limit."""

    least: int = 0
    most: int = 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the need of one demand is calculated from, at one probe."""

    load: Load
    fleet: Fleet
    rates: Rates
    settings: WatcherSettings
    now: float

    @property
    def rate(self) -> float:
        """Return μ: the tasks a second of one worker."""
        return self.rates.service(self.settings)

    @property
    def startup_s(self) -> float:
        """Return S: the seconds from start to ready."""
        return self.rates.startup(self.settings)

    def target_s(self, queue: QueueName) -> float:
        """Return T: the seconds within which a queue's tasks are to be served."""
        return float(getattr(self.settings, f"{queue}_target_s"))

    @property
    def starting(self) -> Counter[float]:
        """Return since when how many workers have been starting, without those that take much too long."""
        since = self.now - STUCK * self.startup_s - 10
        return Counter({at: workers for at, workers in self.fleet.starting.items() if at >= since})


def need_of(seen: Inputs, cooldown: Cooldown, bounds: Bounds) -> Need:
    """Return what a demand asks for, within its bounds."""
    possible = seen.fleet.possible
    need = by_threshold(seen, cooldown) if seen.settings.mode == "threshold" else by_target(seen)
    unlimited = max(bounds.least, min(need.desired, bounds.most or need.desired))
    least, most = min(bounds.least, possible), min(bounds.most or possible, possible)
    desired, minimum = (max(least, min(number, most)) for number in (need.desired, need.minimum))
    limit = f", and the floor is {bounds.least}" if need.minimum < bounds.least >= unlimited else ""
    limit = f", and the ceiling leaves {bounds.most}" if bounds.most and need.desired > bounds.most else limit
    return replace(need, desired=desired, minimum=minimum, unlimited=unlimited, cause=need.cause + limit)


def by_threshold(seen: Inputs, cooldown: Cooldown) -> Need:
    """Ask for one more worker while more than N tasks wait, at most once in a number of seconds.

    Workers that a steady load needs keep running even if fewer than N tasks wait: soon more would wait again.
    """
    settings, running, load = seen.settings, seen.fleet.running, seen.load.whole
    waiting = load.waiting + load.due
    due = cooldown.last_up is None or seen.now - cooldown.last_up >= settings.threshold_every_s
    deep = waiting > settings.threshold_depth
    desired = min(running + 1, max(running, settings.threshold_workers)) if deep and due else running
    minimum = running if deep else max(int(bool(waiting or load.in_flight)), _keep_up(seen).minimum)
    than = "more than" if deep else "not more than"
    cause = f"{tasks_wait(waiting)}, {than} the threshold of {settings.threshold_depth}"
    return Need(desired=desired, minimum=minimum, cause=cause)


def by_target(seen: Inputs) -> Need:
    """Ask for as many workers as drain each queue within its target and keep up with what arrives."""
    asked = [_keep_up(seen)]
    waiting, arriving, keep = 0, 0.0, 0
    names: list[QueueName] = []
    for name, arrival in zip(QUEUES, seen.rates.recent, strict=True):
        queue = seen.load.tiers[name]
        waiting += queue.waiting + queue.due
        arriving += arrival
        if queue.waiting or queue.due:
            names.append(name)
            # Of several that ask for as many, the first gives the reason: what waits, before what arrives.
            asked[:0] = [_drain(seen, names, waiting, arriving), _late(seen, name, queue.oldest_s)]
            keep = max(keep, math.ceil(waiting / (seen.rate * seen.target_s(name))))
    top, in_flight = max(asked, key=lambda need: need.desired), seen.load.whole.in_flight
    if top is asked[-1] and in_flight and seen.rates.arrived < 1:
        top = replace(top, cause=f"nothing waits; {in_flight:,} in flight")
    minimum = max(int(in_flight > 0), *(need.minimum for need in asked))
    return replace(top, minimum=minimum, keep=keep)


def _drain(seen: Inputs, queues: Sequence[QueueName], waiting: int, arriving: float) -> Need:
    """Ask what it takes to drain ``waiting`` tasks, the last of ``queues`` by S + T (see above)."""
    rate, startup_s, target_s = seen.rate, seen.startup_s, seen.target_s(queues[-1])
    horizon_s = startup_s + target_s
    if not seen.rates.known and seen.rates.saturated < SURE_PROBES:
        arriving = 0.0  # the workers keep up with it, and how much more they could serve is not known
    work = waiting + arriving * horizon_s
    have = seen.fleet.active * horizon_s + sum(
        workers * (horizon_s - max(0.0, startup_s - (seen.now - since)))
        for since, workers in seen.starting.items()
    )
    short = work - rate * have
    more = math.ceil(short / (rate * target_s)) if short > 0 else 0
    cause = f"{tasks_wait(waiting)} in {' and '.join(queues)}"
    if arriving:
        cause += f" and {arriving:.3g}/s arrive"
    if more:
        cause += f", {more:,} more can serve them within {horizon_s:.3g} s at {rate:.3g}/s each"
    else:
        cause += f", and those that run serve them within {horizon_s:.3g} s"
    minimum = max(1, math.ceil(work / (rate * horizon_s)))
    return Need(desired=seen.fleet.running + more, minimum=minimum, cause=cause)


def _late(seen: Inputs, queue: QueueName, oldest_s: float) -> Need:
    """Ask for one more when a task has waited much too long: the measured rates must be wrong."""
    limit_s = seen.startup_s + 2 * seen.target_s(queue)
    late = oldest_s > limit_s and not seen.starting
    cause = f"a task has waited in {queue} for {oldest_s:.4g} s, longer than {limit_s:.4g} s" if late else ""
    return Need(desired=seen.fleet.running + int(late), minimum=0, cause=cause)


def _keep_up(seen: Inputs) -> Need:
    """Ask for what a steady load needs."""
    rate, steady, aim, desired = seen.rate, seen.rates.steady, seen.settings.utilisation, seen.fleet.running
    if seen.rates.arrived < 1:
        return Need(desired=desired, minimum=0, cause="nothing waits and nothing arrives")
    minimum = math.ceil(steady / (rate * (aim - SLACK)))
    # Before the rate is known, only a backlog shows that there are too few.
    if seen.rates.known and steady > rate * (aim + SLACK) * desired:
        desired = max(desired, math.ceil(steady / (rate * aim)))
    cause = f"{steady:.3g} tasks/s arrive, and a worker serves {rate:.3g}/s"
    return Need(desired=desired, minimum=minimum, cause=cause)
