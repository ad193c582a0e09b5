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
from dataclasses import dataclass, replace

from gpuinfer.settings import QUEUES, QueueName, WatcherSettings
from gpuinfer.watcher.calm import Calm
from gpuinfer.watcher.fleet import Fleet
from gpuinfer.watcher.load import Load
from gpuinfer.watcher.rates import SURE_LOOKS, Rates
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
    load: Load, fleet: Fleet, rates: Rates, calm: Calm, settings: WatcherSettings, now: float, bounds: Bounds
) -> Need:
    """Return what a demand asks for, within its bounds."""
    if settings.mode == "threshold":
        need = by_threshold(load, fleet, rates, calm, settings, now)
    else:
        need = by_target(load, fleet, rates, settings, now)
    wanted = max(bounds.least, min(need.up, bounds.most or need.up))
    least = min(bounds.least, fleet.possible)
    most = min(bounds.most or fleet.possible, fleet.possible)
    up, enough = (max(least, min(number, most)) for number in (need.up, need.enough))
    return replace(need, up=up, enough=enough, wanted=wanted)


def by_threshold(
    load: Load, fleet: Fleet, rates: Rates, calm: Calm, settings: WatcherSettings, now: float
) -> Need:
    """Ask for one more worker while more than N tasks wait, at most once in a number of seconds.

    Those that keep up with a steady load stay, though less than that waits: it would soon be more again.
    """
    waiting, running = load.waiting + load.due, fleet.running
    due = calm.last_up is None or now - calm.last_up >= settings.threshold_every_s
    deep = waiting > settings.threshold_depth
    up = min(running + 1, max(running, settings.threshold_workers)) if deep and due else running
    busy = load.in_flight
    enough = running if deep else max(int(bool(waiting or busy)), _keep_up(fleet, rates, settings).enough)
    formula = f"{waiting} waiting {'>' if deep else '<='} {settings.threshold_depth}"
    return Need(up=up, enough=enough, formula=formula)


def by_target(load: Load, fleet: Fleet, rates: Rates, settings: WatcherSettings, now: float) -> Need:
    """Ask for as many workers as drain each queue within its target and keep up with what arrives."""
    asked = [_keep_up(fleet, rates, settings)]
    waiting, arriving, keep = 0, 0.0, 0
    for name, arrival in zip(QUEUES, rates.recent, strict=True):
        queue = load.tiers[name]
        waiting += queue.waiting + queue.due
        arriving += arrival
        if queue.waiting or queue.due:
            asked.append(_drain(name, waiting, arriving, fleet, rates, settings, now))
            asked.append(_late(name, queue.oldest_s, fleet, rates, settings, now))
            keep = max(keep, math.ceil(waiting / (rates.service(settings) * _target(name, settings))))
    top = max(asked, key=lambda need: need.up)
    enough = max(int(load.in_flight > 0), *(need.enough for need in asked))
    return replace(top, enough=enough, keep=keep)


def _target(queue: QueueName, settings: WatcherSettings) -> float:
    return float(getattr(settings, f"{queue}_target_s"))


def _drain(
    queue: QueueName,
    waiting: int,
    arriving: float,
    fleet: Fleet,
    rates: Rates,
    settings: WatcherSettings,
    now: float,
) -> Need:
    """Ask what it takes to drain ``waiting`` tasks by S + T. See the module's docstring."""
    rate, startup, target = rates.service(settings), rates.startup(settings), _target(queue, settings)
    horizon = startup + target
    if not rates.known and rates.saturated < SURE_LOOKS:
        arriving = 0.0  # it is kept up with, by workers of whom nobody knows what more they could do
    work = waiting + arriving * horizon
    have = fleet.active * horizon + _from_starting(fleet.starting, startup, horizon, now)
    short = work - rate * have
    more = math.ceil(short / (rate * target)) if short > 0 else 0
    formula = (
        f"{queue}: {waiting} waiting + {arriving:.3g}/s x {horizon:.3g} s against {have:.4g} worker-seconds "
        f"x {rate:.3g}/s: {'short ' + format(short, '.4g') if short > 0 else 'drains in time'}"
    )
    if more:
        formula += f", / ({rate:.3g}/s x {target:g} s) = {more} more"
    return Need(up=fleet.running + more, enough=max(1, math.ceil(work / (rate * horizon))), formula=formula)


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
    formula = f"{queue}: the oldest waits {oldest_s:.4g} s, more than {limit:.4g} s" if late else ""
    return Need(up=fleet.running + int(late), enough=0, formula=formula)


def _keep_up(fleet: Fleet, rates: Rates, settings: WatcherSettings) -> Need:
    """Ask for what a steady load needs."""
    rate, steady, aim = rates.service(settings), rates.steady, settings.utilisation
    if rates.arrived < 1:
        return Need(up=fleet.running, enough=0, formula="nothing arrives")
    enough = math.ceil(steady / (rate * (aim - SLACK)))
    up = fleet.running
    # Before the rate is known, only a backlog tells that there are too few.
    if rates.known and steady > rate * (aim + SLACK) * up:
        up = max(up, math.ceil(steady / (rate * aim)))
    return Need(
        up=up, enough=enough, formula=f"{steady:.3g}/s arrive, {rate:.3g}/s a worker: {enough} keep up"
    )
