# SPDX-License-Identifier: Apache-2.0
"""How many workers a demand needs: the formulas.

Let n workers run at μ tasks a second each, let a start take S seconds, and let the target of a queue be
T. A worker that is started now can only help after S, so the backlog Q that is there now and what
keeps arriving (λ a second) is to be gone after H = S + T. What is missing then,
``short = Q + λH - μ·(worker-seconds there will be until H)``, is the work of ``short / (μT)`` more workers,
each of which has T seconds for it. For each queue Q counts the more urgent ones too, which go first, and what
falls due within S.

Steady load asks for λ / (μ·u) workers, u being the utilisation aimed at. More are started only when they
would be busier than u + 0.1, and stopped only when one less would not be busier than u - 0.1: under a
constant load there is a number with which neither holds.
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

#: Between the utilisation that starts one more worker and the one aimed at; and likewise below.
SLACK = 0.1
#: A start that takes this many times as long as usual is not counted on.
STUCK = 3.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many workers run at least and at most; most 0: all there are."""

    least: int = 0
    most: int = 0


def need_of(
    load: Load,
    fleet: Fleet,
    rates: Rates,
    cooldown: Cooldown,
    settings: WatcherSettings,
    now: float,
    bounds: Bounds,
) -> Need:
    """Return what a demand asks for, within its bounds."""
    if settings.mode == "threshold":
        need = by_threshold(load, fleet, rates, cooldown, settings, now)
    else:
        need = by_target(load, fleet, rates, settings, now)
    unlimited = max(bounds.least, min(need.desired, bounds.most or need.desired))
    least = min(bounds.least, fleet.possible)
    most = min(bounds.most or fleet.possible, fleet.possible)
    desired, minimum = (max(least, min(number, most)) for number in (need.desired, need.minimum))
    limit = f", and the floor is {bounds.least}" if need.minimum < bounds.least >= unlimited else ""
    limit = f", and the ceiling leaves {bounds.most}" if bounds.most and need.desired > bounds.most else limit
    return replace(need, desired=desired, minimum=minimum, unlimited=unlimited, cause=need.cause + limit)


def by_threshold(
    load: Load, fleet: Fleet, rates: Rates, cooldown: Cooldown, settings: WatcherSettings, now: float
) -> Need:
    """Ask for one more worker while more than N tasks wait, at most once in a number of seconds.

    Workers that a steady load needs keep running even if fewer than N tasks wait: soon more would wait again.
    """
    waiting, running = load.waiting + load.due, fleet.running
    due = cooldown.last_up is None or now - cooldown.last_up >= settings.threshold_every_s
    deep = waiting > settings.threshold_depth
    desired = min(running + 1, max(running, settings.threshold_workers)) if deep and due else running
    busy = load.in_flight
    minimum = running if deep else max(int(bool(waiting or busy)), _keep_up(fleet, rates, settings).minimum)
    than = "more than" if deep else "not more than"
    cause = f"{tasks_wait(waiting)}, {than} the threshold of {settings.threshold_depth}"
    return Need(desired=desired, minimum=minimum, cause=cause)


def by_target(load: Load, fleet: Fleet, rates: Rates, settings: WatcherSettings, now: float) -> Need:
    """Ask for as many workers as drain each queue within its target and keep up with what arrives."""
    asked = [_keep_up(fleet, rates, settings)]
    waiting, arriving, keep = 0, 0.0, 0
    names: list[QueueName] = []
    for name, arrival in zip(QUEUES, rates.recent, strict=True):
        queue = load.tiers[name]
        waiting += queue.waiting + queue.due
        arriving += arrival
        if queue.waiting or queue.due:
            names.append(name)
            drain = _drain(names, waiting, arriving, fleet, rates, settings, now)
            # Where several ask for as many, the first has the word: what waits, before what arrives.
            asked[:0] = [drain, _late(name, queue.oldest_s, fleet, rates, settings, now)]
            keep = max(keep, math.ceil(waiting / (rates.service(settings) * _target(name, settings))))
    top = max(asked, key=lambda need: need.desired)
    if top is asked[-1] and load.in_flight and rates.arrived < 1:
        top = replace(top, cause=f"nothing waits; {load.in_flight:,} in flight")
    minimum = max(int(load.in_flight > 0), *(need.minimum for need in asked))
    return replace(top, minimum=minimum, keep=keep)


def _target(queue: QueueName, settings: WatcherSettings) -> float:
    return float(getattr(settings, f"{queue}_target_s"))


def _drain(
    queues: Sequence[QueueName],
    waiting: int,
    arriving: float,
    fleet: Fleet,
    rates: Rates,
    settings: WatcherSettings,
    now: float,
) -> Need:
    """Ask what it takes to drain ``waiting`` tasks, the last of ``queues`` by S + T (see above)."""
    rate, startup, target = rates.service(settings), rates.startup(settings), _target(queues[-1], settings)
    horizon = startup + target
    if not rates.known and rates.saturated < SURE_PROBES:
        arriving = 0.0  # the workers keep up with it, and nobody knows what more they could do
    work = waiting + arriving * horizon
    have = fleet.active * horizon + _from_starting(fleet.starting, startup, horizon, now)
    short = work - rate * have
    more = math.ceil(short / (rate * target)) if short > 0 else 0
    cause = f"{tasks_wait(waiting)} in {' and '.join(queues)}"
    if arriving:
        cause += f" and {arriving:.3g}/s arrive"
    if more:
        cause += f", {more:,} more can serve them within {horizon:.3g} s at {rate:.3g}/s each"
    else:
        cause += f", and those that run serve them within {horizon:.3g} s"
    minimum = max(1, math.ceil(work / (rate * horizon)))
    return Need(desired=fleet.running + more, minimum=minimum, cause=cause)


def _from_starting(starting: Counter[float], startup: float, horizon: float, now: float) -> float:
    """Return the worker-seconds until ``horizon`` of those that start now."""
    total = 0.0
    for since, workers in starting.items():
        if not _stuck(since, startup, now):
            total += workers * (horizon - max(0.0, startup - (now - since)))
    return total


def _stuck(since: float, startup: float, now: float) -> bool:
    return now - since > STUCK * startup + 10


def _late(
    queue: QueueName, oldest_s: float, fleet: Fleet, rates: Rates, settings: WatcherSettings, now: float
) -> Need:
    """Ask for one more when tasks wait much too long, whatever the rates say: they must be wrong."""
    startup = rates.startup(settings)
    limit = startup + 2 * _target(queue, settings)
    coming = any(not _stuck(since, startup, now) for since in fleet.starting)
    late = oldest_s > limit and not coming
    cause = f"a task has waited in {queue} for {oldest_s:.4g} s, longer than {limit:.4g} s" if late else ""
    return Need(desired=fleet.running + int(late), minimum=0, cause=cause)


def _keep_up(fleet: Fleet, rates: Rates, settings: WatcherSettings) -> Need:
    """Ask for what a steady load needs."""
    rate, steady, aim = rates.service(settings), rates.steady, settings.utilisation
    if rates.arrived < 1:
        return Need(desired=fleet.running, minimum=0, cause="nothing waits and nothing arrives")
    minimum = math.ceil(steady / (rate * (aim - SLACK)))
    desired = fleet.running
    # Before the rate is known, only a backlog shows that there are too few.
    if rates.known and steady > rate * (aim + SLACK) * desired:
        desired = max(desired, math.ceil(steady / (rate * aim)))
    cause = f"{steady:.3g} tasks/s arrive, and a worker serves {rate:.3g}/s"
    return Need(desired=desired, minimum=minimum, cause=cause)
