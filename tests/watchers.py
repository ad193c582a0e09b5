# SPDX-License-Identifier: Apache-2.0
"""Small worlds for the watcher's policy: instances that start and stop, and queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import EVERYTHING, Serves
from gpuinfer.settings import QUEUES, WatcherSettings
from gpuinfer.watcher.memory import UnitMemory
from gpuinfer.watcher.part import Measured
from gpuinfer.watcher.policy import Decision, History, decide
from gpuinfer.watcher.rates import Rates
from gpuinfer.watcher.state import Action, Instance, Key, Observation, QueueState, UnitState

#: Ten tasks a second of each worker, ten seconds to start: measured.
KNOWN = Rates(served=10.0, worked=1.0, known=True, startup_s=10.0)


def settings(**changes: object) -> WatcherSettings:
    """Return the defaults with some changes."""
    return WatcherSettings.model_validate(changes)


def remembering(rates: Rates, units: Mapping[Key, UnitMemory] | None = None) -> History:
    """Return a history of a fleet in which all serve the same."""
    return History(parts={str(EVERYTHING): Measured(rates=rates)}, units=units or {})


def keys(count: int, hosts: Iterable[str] = ("a",)) -> list[Key]:
    """Return this many keys on each host."""
    return [Key(number, host) for host in hosts for number in range(count)]


def observe(
    instances: Iterable[Instance] = (),
    *,
    waiting: int = 0,
    in_flight: int = 0,
    done: int = 0,
    oldest_s: float = 0.0,
    queue: str = "default",
    host: str | None = None,
    live: Iterable[str] = (),
) -> Observation:
    """Return an observation with one queue that is not empty."""
    queues = {Lane(name, ""): QueueState() for name in QUEUES}
    queues[Lane(queue, "")] = QueueState(waiting=waiting, in_flight=in_flight, done=done, oldest_s=oldest_s)
    return Observation(queues=queues, instances=tuple(instances), host=host, live_hosts=frozenset(live))


@dataclass
class World:
    """Time passes in steps of a second. Waiting, arrived and served tasks are whole numbers."""

    instances: dict[Key, Instance]
    startup_s: float = 10.0
    rate: float = 10.0
    now: float = 1000.0
    waiting: int = 0
    arrived: float = 0.0
    done: int = 0
    credit: float = 0.0
    #: Show one of the busy workers idle at each look, as between two batches.
    glimpses: bool = False
    #: What was done to which instance, in order.
    log: list[tuple[float, Action]] = field(default_factory=list)

    @classmethod
    def of(cls, many: Iterable[Key], **more: object) -> World:
        """Return a world in which nothing runs."""
        return cls({key: Instance(key=key, busy=False) for key in many}, **more)  # type: ignore[arg-type]

    @property
    def running(self) -> set[Key]:
        """Return which instances serve or are about to."""
        return {key for key, instance in self.instances.items() if instance.runs}

    def active(self) -> int:
        """Return how many instances serve."""
        return sum(instance.state == "active" for instance in self.instances.values())

    def set(self, key: Key, **changes: object) -> None:
        """Change one instance."""
        self.instances[key] = replace(self.instances[key], **changes)  # type: ignore[arg-type]

    def pass_second(self, arrivals: float) -> None:
        """Let tasks arrive, workers become ready, and tasks be served."""
        self.now += 1
        for key, instance in self.instances.items():
            if instance.state == "activating" and self.now - instance.since >= self.startup_s:
                self.set(key, state="active", since=self.now)
        before = int(self.arrived)
        self.arrived += arrivals
        self.waiting += int(self.arrived) - before
        active = self.active()
        self.credit = min(self.credit, active) + active * self.rate
        served = min(self.waiting, int(self.credit))
        self.credit -= served
        self.waiting -= served
        self.done += served
        self._mark()

    def _mark(self) -> None:
        """Tell who is busy: while tasks wait all are, except who has just become ready and claims next."""
        active = [key for key, one in self.instances.items() if one.state == "active"]
        glimpsed = active[int(self.now) % len(active)] if self.glimpses and active else None
        for key, instance in self.instances.items():
            ready = instance.state == "active" and instance.since < self.now
            busy = self.waiting > 0 and ready and key != glimpsed
            if instance.busy != busy:
                self.set(key, busy=busy)

    def see(self, host: str | None = None, live: Iterable[str] = ()) -> Observation:
        """Return what a probe would see now."""
        return observe(self.instances.values(), waiting=self.waiting, done=self.done, host=host, live=live)

    def do(self, actions: Iterable[Action]) -> None:
        """Carry actions out."""
        for action in actions:
            self.log.append((self.now, action))
            state = "activating" if action.verb == "start" else "inactive"
            self.set(action.key, state=state, since=self.now)

    def verbs(self, since: float = 0.0) -> list[str]:
        """Return what was done from a moment on."""
        return [action.verb for at, action in self.log if at >= since]


@dataclass
class Watcher:
    """One watcher of a world."""

    world: World | Mixed
    settings: WatcherSettings
    host: str | None = None
    live: frozenset[str] = frozenset()
    history: History = field(default_factory=History)

    @property
    def measured(self) -> Measured:
        """Return what it knows of a fleet in which all serve the same."""
        return self.history.parts[str(EVERYTHING)]

    def decide(self, seen: Observation | None = None) -> Decision:
        """Look and decide; remember, and do nothing."""
        seen = seen or self.world.see(self.host, self.live)
        decision = decide(seen, self.history, self.settings, self.world.now)
        self.history = decision.history
        return decision

    def look(self, seen: Observation | None = None) -> Decision:
        """Look, decide, and do what is this watcher's to do."""
        decision = self.decide(seen)
        own = decision.actions if self.host is None else decision.of(self.host)
        self.world.do(own)
        return decision

    def run(self, seconds: int, arrivals: float | Mapping[Lane, float] = 0.0) -> None:
        """Look once a second. ``arrivals`` a second; of a mixed world, by lane."""
        for _ in range(seconds):
            self.world.pass_second(arrivals or {} if isinstance(self.world, Mixed) else arrivals)  # type: ignore[arg-type]
            self.look()


@dataclass
class Mixed:
    """A world whose instances do not all serve the same, in steps of a second."""

    instances: dict[Key, Instance]
    lanes: dict[Lane, int]
    startup_s: float = 10.0
    rate: float = 10.0
    now: float = 1000.0
    done: Counter[Lane] = field(default_factory=Counter)
    credit: dict[Key, float] = field(default_factory=dict)
    arrived: dict[Lane, float] = field(default_factory=dict)
    #: What was done to which instance, in order.
    log: list[tuple[float, Action]] = field(default_factory=list)

    @classmethod
    def of(cls, groups: Mapping[Serves, Iterable[Key]], lanes: Iterable[Lane], **more: float) -> Mixed:
        """Return a world in which nothing runs, and nothing waits."""
        made = {
            key: Instance(key=key, serves=serves, busy=False)
            for serves, many in groups.items()
            for key in many
        }
        return cls(made, dict.fromkeys(lanes, 0), **more)  # type: ignore[arg-type]

    def running(self, serves: Serves | None = None) -> set[Key]:
        """Return which instances serve or are about to: all, or those of a group."""
        there = self.instances.values()
        return {one.key for one in there if one.runs and (serves is None or one.serves == serves)}

    def run_all(self, serves: Serves | None = None) -> None:
        """Let all instances, or those of a group, have run for long."""
        for key, one in self.instances.items():
            if serves is None or one.serves == serves:
                self.instances[key] = replace(one, state="active", since=0.0)

    def pass_second(self, arrivals: Mapping[Lane, float] | None = None) -> None:
        """Let tasks arrive, workers become ready, and tasks be served: the most urgent first."""
        self.now += 1
        for lane, count in (arrivals or {}).items():
            before = self.arrived.get(lane, 0.0)
            self.arrived[lane] = before + count
            self.lanes[lane] += int(before + count) - int(before)
        for key, one in self.instances.items():
            if one.state == "activating" and self.now - one.since >= self.startup_s:
                self.instances[key] = replace(one, state="active", since=self.now)
        for key, one in self.instances.items():
            if one.state == "active":
                self._work(key, one)

    def _work(self, key: Key, one: Instance) -> None:
        credit = min(self.credit.get(key, 0.0), 1.0) + self.rate
        for lane in sorted(self.lanes, key=lambda lane: QUEUES.index(lane.tier)):
            if one.serves.covers(lane):
                served = min(self.lanes[lane], int(credit))
                credit -= served
                self.lanes[lane] -= served
                self.done[lane] += served
        self.credit[key] = credit
        busy = any(count and one.serves.covers(lane) for lane, count in self.lanes.items())
        self.instances[key] = replace(one, busy=busy and one.since < self.now)

    def see(self, host: str | None = None, live: Iterable[str] = ()) -> Observation:
        """Return what a probe would see now."""
        queues = {
            lane: QueueState(waiting=count, done=self.done[lane])
            for lane, count in sorted(self.lanes.items())
        }
        instances = tuple(self.instances.values())
        return Observation(queues=queues, instances=instances, host=host, live_hosts=frozenset(live))

    def do(self, actions: Iterable[Action]) -> None:
        """Carry actions out."""
        for action in actions:
            self.log.append((self.now, action))
            state: UnitState = "activating" if action.verb == "start" else "inactive"
            self.instances[action.key] = replace(self.instances[action.key], state=state, since=self.now)

    def verbs(self, since: float = 0.0) -> list[str]:
        """Return what was done from a moment on."""
        return [action.verb for at, action in self.log if at >= since]
