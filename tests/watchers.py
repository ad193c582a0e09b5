# SPDX-License-Identifier: Apache-2.0
"""A small world for the watcher's policy: instances that start and stop, and one queue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from gpuinfer.settings import WatcherSettings
from gpuinfer.watcher.policy import Decision, History, decide
from gpuinfer.watcher.rates import Rates
from gpuinfer.watcher.state import Action, Instance, Key, Observation, QueueState, empty_queues

#: Ten tasks a second of each worker, ten seconds to start: measured.
KNOWN = Rates(served=10.0, worked=1.0, known=True, startup_s=10.0)


def settings(**changes: object) -> WatcherSettings:
    """Return the defaults with some changes."""
    return WatcherSettings.model_validate(changes)


def keys(count: int, hosts: Iterable[str] = ("a",)) -> list[Key]:
    """Return so many keys on each host."""
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
    queues = empty_queues()
    queues[queue] = QueueState(waiting=waiting, in_flight=in_flight, done=done, oldest_s=oldest_s)
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
        """Tell who is busy: while tasks wait all are, but for who has just become ready and claims next."""
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

    world: World
    settings: WatcherSettings
    host: str | None = None
    live: frozenset[str] = frozenset()
    history: History = field(default_factory=History)

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

    def run(self, seconds: int, arrivals: float = 0.0) -> None:
        """Look once a second."""
        for _ in range(seconds):
            self.world.pass_second(arrivals)
            self.look()
