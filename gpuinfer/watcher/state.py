# SPDX-License-Identifier: Apache-2.0
"""What the policy sees and what it answers: plain values, frozen.

probe ► Observation ─┐
History (before) ────┼─► policy.decide ► Decision (actions, why, History after) ► units
settings, now ───────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import EVERYTHING, Serves

UnitState = Literal["inactive", "activating", "active", "deactivating", "failed"]
#: What an administrator did by hand, and the watcher respects: a start for a while, a stop or a change from
#: enabled to disabled until a start, an enable or a boot.
Hold = Literal["", "started", "stopped", "disabled"]
Verb = Literal["start", "stop"]
#: "repair": starts that keep failing are stopped.
Verdict = Literal["scale_up", "scale_down", "hold", "repair"]


class Key(NamedTuple):
    """One instance of one host. The order of keys is the order in which instances are started.

    The number comes first: the load is spread over hosts, and the loss of one costs less.
    """

    number: int
    host: str

    def __str__(self) -> str:
        return f"gpu{self.number}@{self.host}"


class Exclusion(NamedTuple):
    """Why an instance must not be started, and for how long."""

    reason: str
    #: In words, such as "until it is unmasked"; empty where it is part of the reason.
    until: str = ""
    #: It ends without anybody's help.
    ends: bool = True
    #: What follows ``until`` in the sentence; it does not change with time, either.
    cause: str = ""

    def __str__(self) -> str:
        if self.cause:
            return f"{self.reason} {self.until}{self.cause}"
        return f"{self.reason}, {self.until}" if self.until else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    """What NVML says of an instance's GPU, beyond our own worker."""

    #: Memory that other programs hold.
    foreign_bytes: int = 0
    #: Why it cannot be used (an Xid, ECC errors, no answer); empty when it is healthy.
    fault: str = ""
    #: How hot it is, when that is too hot to start anything on it; it cools down by itself.
    hot: str = ""
    #: Why nothing is known of it yet: no failure, but nothing is started on it either.
    unknown: str = ""


HEALTHY = GpuHealth()


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One worker unit, as systemd, NVML and its heartbeat show it."""

    key: Key
    state: UnitState = "inactive"
    #: When it entered that state, on the clock of ``now``.
    since: float = 0.0
    enabled: bool = False
    masked: bool = False
    #: Somebody has stopped the target of all workers of its host.
    target_stopped: bool = False
    #: systemd has a job for it that waits for its turn.
    queued: bool = False
    #: How often systemd has restarted it by itself since somebody has started it.
    restarts: int = 0
    #: When it last became ready, on the clock of ``now``; 0: not known.
    ready_at: float = 0.0
    #: None: not known, as without a fresh heartbeat; such a one is not stopped.
    busy: bool | None = None
    #: It claims nothing, by an administrator's wish: it is neither counted upon nor stopped.
    drained: bool = False
    gpu: GpuHealth = HEALTHY
    #: What it serves while it runs, else what it would serve.
    serves: Serves = EVERYTHING
    #: For instances of other hosts, as their watchers publish it.
    hold: Hold = ""
    #: For instances of other hosts: why their watcher will not start it, or does not count on its start.
    excluded: str = ""
    #: For instances of other hosts: their watcher only logs, and neither starts nor stops any.
    log_only: bool = False

    @property
    def told_exclusion(self) -> Exclusion | None:
        """Return the exclusion that another host's watcher has told."""
        ends = not self.masked and self.hold not in ("stopped", "disabled")
        return Exclusion(self.excluded, ends=ends) if self.excluded else None

    @property
    def runs(self) -> bool:
        """Tell whether it serves, or is about to."""
        return self.state in ("active", "activating")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """One lane, or several together, at one moment."""

    waiting: int = 0
    in_flight: int = 0
    #: Tasks that have left this queue settled, counted from any fixed moment on.
    done: int = 0
    #: How long the longest-waiting task has waited; 0 when none does.
    oldest_s: float = 0.0
    #: Tasks whose ETA comes before a worker that is started now could serve them.
    due: int = 0
    #: True: nothing is claimed from it until it is resumed.
    paused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one watcher has measured, as it tells the others."""

    #: Tasks served and worker-seconds spent; None: nothing yet.
    served: float | None
    worked: float
    #: False: workers can do that much at least.
    known: bool
    startup_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything a decision is made from."""

    #: None: Redis cannot be read.
    queues: Mapping[Lane, QueueState] | None
    #: All instances of all hosts that are known, in any order.
    instances: tuple[Instance, ...] = ()
    #: The host this watcher acts for; None: all of them, as in the simulator.
    host: str | None = None
    #: Hosts whose watcher is alive; others' instances serve, and nobody would start them.
    live_hosts: frozenset[str] = frozenset()
    dead_letters: int = 0
    #: Host -> part of the fleet -> what its watcher has measured there; only watchers that are alive.
    figures: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)
    #: Tasks that active workers hold, by what those serve; None: all that are in flight.
    held: Mapping[Serves, int] | None = None
    #: Whether what is decided is done; else it is only logged.
    acts: bool = True
    #: Why Redis cannot be read.
    trouble: str = ""

    def owns(self, key: Key) -> bool:
        """Tell whether this watcher is the one that starts and stops an instance."""
        return self.host is None or key.host == self.host

    def alive(self, key: Key) -> bool:
        """Tell whether some watcher would act on an instance."""
        return self.owns(key) or key.host in self.live_hosts

    @property
    def waiting(self) -> int:
        """Return how many tasks wait in all lanes."""
        return sum(queue.waiting for queue in (self.queues or {}).values())


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do to one instance, and why."""

    verb: Verb
    key: Key
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """How many workers queues and rates ask for."""

    #: Start until this many run; no more than there are.
    desired: int
    #: Those beyond may be stopped when that stays so.
    minimum: int
    #: Fewer would not drain in time what waits now, and so are not left, however long the minimum was lower.
    keep: int = 0
    #: What is desired before limits: whether there are as many instances or not, within floor and ceiling.
    unlimited: int = 0
    #: Why, with the numbers.
    cause: str
