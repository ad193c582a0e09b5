# SPDX-License-Identifier: Apache-2.0
"""How many workers should run, and what to do about it: pure, the same for systemd and the simulator.

Let n workers run at μ tasks a second each, let a start take S seconds, and let the target of a queue be
T. A worker that is started now can only help after S, so the backlog Q that is there now and what
keeps arriving (λ a second) is to be gone after H = S + T. What is missing then,
``short = Q + λH - μ·(worker-seconds there will be until H)``, is the work of ``short / (μT)`` more workers,
each of which has T seconds for it. For each queue Q counts the more urgent ones too, which go first.

Steady load asks for λ / (μ·u) workers, u being the utilisation aimed at. More are started only when they
would be busier than u + 0.1, and stopped only when one less would not be busier than u - 0.1: under a
constant load there is a number with which neither holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gpuinfer.settings import QUEUES, QueueName, WatcherSettings
from gpuinfer.watcher.calm import Calm
from gpuinfer.watcher.memory import FAILED_STARTS, UnitMemory, commanded, out, remember
from gpuinfer.watcher.plan import Fleet, plan
from gpuinfer.watcher.rates import SURE_LOOKS, Rates, measure, with_startups
from gpuinfer.watcher.state import Action, Instance, Key, Need, Observation, Verdict

#: Between the utilisation that starts one more worker and the one aimed at; and likewise below.
SLACK = 0.1
#: So many of the instances that are out are named.
NAMED = 8
#: Who has been ready for fewer looks has had no time to claim anything, and is not stopped.
SETTLED_LOOKS = 2
#: A start that takes so many times as long as usual is not counted upon.
STUCK = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What one decision hands on to the next."""

    rates: Rates = field(default_factory=Rates)
    calm: Calm = field(default_factory=Calm)
    units: Mapping[Key, UnitMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and what to remember."""

    actions: tuple[Action, ...]
    verdict: Verdict
    why: str
    #: What it was decided from: one number or text a name, for the journal.
    inputs: Mapping[str, object]
    history: History
    #: Instances that are not to be started.
    out: frozenset[Key] = frozenset()

    def of(self, host: str) -> tuple[Action, ...]:
        """Return the actions that are this host's to carry out."""
        return tuple(action for action in self.actions if action.key.host == host)


def decide(seen: Observation, history: History, settings: WatcherSettings, now: float) -> Decision:
    """Decide. Pure: the same arguments give the same decision."""
    remembered = remember(seen, history.units, settings, now)
    rates = with_startups(history.rates, remembered.startups)
    if seen.queues is None:
        kept = replace(history, rates=rates, units=remembered.units)
        why = f"Redis cannot be read, so nothing changes: {seen.trouble or 'no reason given'}"
        return Decision(actions=(), verdict="hold", why=why, inputs={}, history=kept)
    fleet = count(seen, remembered.units, settings, now)
    rates = measure(rates, seen, fleet.active, fleet.all_busy, settings, now)
    shared = rates.pooled(seen.figures.values())
    need = _need(seen, fleet, shared, history.calm, settings, now)
    calm, surplus = history.calm.look(fleet.running, need, settings, now)
    surplus = min(surplus, fleet.running - need.keep)
    if surplus > 0:
        sort_spare(fleet, seen, remembered.units, settings, now)
    actions = plan(fleet, need, surplus)
    verdict = _verdict(actions, fleet)
    calm = calm.after(verdict, settings, now)
    units = commanded(remembered.units, actions, seen, now)
    return Decision(
        actions=tuple(actions),
        verdict=verdict,
        why=_why(fleet, need, calm, actions, settings),
        inputs=_inputs(seen, fleet, shared, need, settings),
        history=History(rates=rates, calm=calm, units=units),
        out=frozenset(fleet.out),
    )


def count(seen: Observation, units: Mapping[Key, UnitMemory], settings: WatcherSettings, now: float) -> Fleet:
    """Sort the instances by what may be done with them. There may be ten thousand, once a second."""
    fleet = Fleet()
    for instance in seen.instances:
        state = instance.state
        if state == "active":
            fleet.active += 1
            fleet.enabled += instance.enabled
            if instance.busy is not True:
                fleet.all_busy = False
            if instance.busy is None and not seen.owns(instance.key):
                fleet.silent += 1
            else:
                fleet.serving.append(instance)
        elif state == "activating":
            _count_starting(fleet, instance, units.get(instance.key), seen, now)
        elif state != "deactivating":
            unit = units.get(instance.key)
            if unit is None or unit.notable or instance.notable:
                _count_stopped(fleet, instance, unit, seen, settings, now)
            else:
                fleet.idle.append(instance.key)
    return fleet


def sort_spare(
    fleet: Fleet, seen: Observation, units: Mapping[Key, UnitMemory], settings: WatcherSettings, now: float
) -> None:
    """Sort those that run by whether they may be stopped, and now; looked at only when there are too many."""
    for instance in fleet.serving:
        if _may_stop(instance, units.get(instance.key), now):
            fleet.spare.append(instance.key)
            settled = now - instance.since >= SETTLED_LOOKS * settings.probe_interval_s
            ready = instance.state == "active" and settled
            if ready and instance.busy is False and seen.alive(instance.key):
                fleet.stoppable.add(instance.key)


def _may_stop(instance: Instance, unit: UnitMemory | None, now: float) -> bool:
    hold = instance.hold if unit is None else unit.held(now)
    return not instance.enabled and hold != "started" and not instance.log_only


def _count_starting(
    fleet: Fleet, instance: Instance, unit: UnitMemory | None, seen: Observation, now: float
) -> None:
    """Count what starts, but for one that has failed to: it would hold up those that could.

    systemd may try once more, for what was wrong may pass within seconds; then it is stopped.
    """
    key = instance.key
    reason = instance.out if unit is None else unit.resting(now)
    if not reason:
        fleet.enabled += instance.enabled
        fleet.starting[instance.since] += 1
        fleet.serving.append(instance)
        return
    fleet.out[key] = reason
    hopeless = unit is not None and unit.failed_starts >= FAILED_STARTS
    if hopeless and _may_stop(instance, unit, now):
        fleet.broken.append(key)


def _count_stopped(
    fleet: Fleet,
    instance: Instance,
    unit: UnitMemory | None,
    seen: Observation,
    settings: WatcherSettings,
    now: float,
) -> None:
    key, enabled = instance.key, instance.enabled
    reason = out(instance, unit, settings, now)
    if not reason and not seen.alive(key):
        reason = "its host's watcher is silent"
    if not reason and instance.log_only:
        reason = "its host's watcher only logs"
    if reason:
        fleet.out[key] = reason
    elif instance.state == "failed":
        (fleet.enabled_failed if enabled else fleet.failed).append(key)
    else:
        (fleet.enabled_idle if enabled else fleet.idle).append(key)


def _need(
    seen: Observation, fleet: Fleet, rates: Rates, calm: Calm, settings: WatcherSettings, now: float
) -> Need:
    if settings.mode == "threshold":
        need = by_threshold(seen, fleet, rates, calm, settings, now)
    else:
        need = by_target(seen, fleet, rates, settings, now)
    wanted = max(settings.floor, min(need.up, settings.ceiling or need.up))
    least = min(settings.floor, fleet.possible)
    most = min(settings.ceiling or fleet.possible, fleet.possible)
    up, enough = (max(least, min(number, most)) for number in (need.up, need.enough))
    return replace(need, up=up, enough=enough, wanted=wanted)


def by_threshold(
    seen: Observation, fleet: Fleet, rates: Rates, calm: Calm, settings: WatcherSettings, now: float
) -> Need:
    """Ask for one more worker while more than N tasks wait, not more often than every so many seconds.

    Those that keep up with a steady load stay, though less than that waits: it would soon be more again.
    """
    waiting, running = seen.waiting, fleet.running
    due = calm.last_up is None or now - calm.last_up >= settings.threshold_every_s
    deep = waiting > settings.threshold_depth
    up = min(running + 1, max(running, settings.threshold_workers)) if deep and due else running
    busy = any(q.in_flight for q in (seen.queues or {}).values())
    enough = running if deep else max(int(bool(waiting or busy)), _keep_up(fleet, rates, settings).enough)
    formula = f"{waiting} waiting {'>' if deep else '<='} {settings.threshold_depth}"
    return Need(up=up, enough=enough, formula=formula)


def by_target(seen: Observation, fleet: Fleet, rates: Rates, settings: WatcherSettings, now: float) -> Need:
    """Ask for as many workers as drain each queue within its target and keep up with what arrives."""
    asked = [_keep_up(fleet, rates, settings)]
    waiting, arriving, keep = 0, 0.0, 0
    for name, arrival in zip(QUEUES, rates.recent, strict=True):
        queue = (seen.queues or {})[name]
        waiting += queue.waiting
        arriving += arrival
        if queue.waiting:
            asked.append(_drain(name, waiting, arriving, fleet, rates, settings, now))
            asked.append(_late(name, queue.oldest_s, fleet, rates, settings, now))
            keep = max(keep, math.ceil(waiting / (rates.service(settings) * _target(name, settings))))
    in_flight = any(q.in_flight for q in (seen.queues or {}).values())
    top = max(asked, key=lambda need: need.up)
    enough = max(int(in_flight), *(need.enough for need in asked))
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


def _verdict(actions: list[Action], fleet: Fleet) -> Verdict:
    verbs = {action.verb for action in actions if action.key not in fleet.broken}
    if "start" in verbs:
        return "scale_up"
    if "stop" in verbs:
        return "scale_down"
    return "repair" if actions else "hold"


def _why(fleet: Fleet, need: Need, calm: Calm, actions: list[Action], settings: WatcherSettings) -> str:
    if actions:
        return f"{actions[0].why}; {need.formula}" if actions[0].verb == "start" else actions[0].why
    if need.wanted > max(fleet.running, need.enough):
        return f"{need.wanted} wanted, but no instance is left to start; {need.formula}"
    if need.enough < fleet.running:
        return f"{need.enough} would do; waits until that has held for {calm.pause(settings):.0f} s"
    return need.formula


def _inputs(
    seen: Observation, fleet: Fleet, rates: Rates, need: Need, settings: WatcherSettings
) -> dict[str, object]:
    inputs: dict[str, object] = {
        "waiting": seen.waiting,
        "oldest_s": round(max((q.oldest_s for q in (seen.queues or {}).values()), default=0.0), 1),
        "arrivals_per_s": round(rates.steady, 3),
        "rate_per_worker": round(rates.service(settings), 3),
        "startup_s": round(rates.startup(settings), 1),
        "active": fleet.active,
        "starting": fleet.running - fleet.active,
        "possible": fleet.possible,
        "wanted": need.wanted,
        "enough": need.enough,
        "dead_letters": seen.dead_letters,
    }
    return {**inputs, "out": _outs(fleet)} if fleet.out else inputs


def _outs(fleet: Fleet) -> str:
    """Return who is out, and why: the first few of them."""
    first = sorted(fleet.out)[:NAMED]
    more = len(fleet.out) - len(first)
    return "; ".join([f"{key}: {fleet.out[key]}" for key in first] + ([f"and {more} more"] if more else []))
