# SPDX-License-Identifier: Apache-2.0
"""The policy's input and output: plain values, frozen.

probe ► Observation ─┐
History (before) ────┼─► policy.decide ► Decision (actions, why, History after) ► units
settings, now ───────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import EVERYTHING, Serves

UnitState = Literal["inactive", "activating", "active", "deactivating", "failed"]
#: What an administrator did by hand: a start counts for a while, a stop or a change from enabled to disabled
#: until a start, an enable or a boot.
Hold = Literal["", "started", "stopped", "disabled"]
Verb = Literal["start", "stop"]
#: "repair": an instance whose starts keep failing is stopped.
Verdict = Literal["scale_up", "scale_down", "hold", "repair"]


class Key(NamedTuple):
    """One instance of one host. The order of keys is the order in which instances are started.

    The number comes first, so that the load is spread over hosts.
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
    #: It ends by itself.
    ends: bool = True
    #: What follows ``until`` in the sentence; like the reason, it does not change with time.
    cause: str = ""

    def __str__(self) -> str:
        if self.cause:
            return f"{self.reason} {self.until}{self.cause}"
        return f"{self.reason}, {self.until}" if self.until else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    """What NVML reports of an instance's GPU, apart from our own worker."""

    #: Memory that other programs hold.
    foreign_bytes: int = 0
    #: Why it cannot be used (an Xid, ECC errors, no answer); empty when it is healthy.
    fault: str = ""
    #: How hot it is, if too hot to start a worker on it; it cools down by itself.
    hot: str = ""
    #: Why nothing is known of it yet: that is no failure, but no worker is started on it.
    unknown: str = ""


HEALTHY = GpuHealth()


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One worker unit, as systemd, NVML and its heartbeat report it."""

    key: Key
    state: UnitState = "inactive"
    #: When it entered that state, on the clock of ``now``.
    since: float = 0.0
    enabled: bool = False
    masked: bool = False
    #: The target of all workers of its host was stopped.
    target_stopped: bool = False
    #: systemd has a job for it that waits for its turn.
    queued: bool = False
    #: How often systemd has restarted it automatically since it was last started.
    restarts: int = 0
    #: When it last became ready, on the clock of ``now``; 0: not known.
    ready_at: float = 0.0
    #: None: not known, for lack of a fresh heartbeat; it is not stopped then.
    busy: bool | None = None
    #: An administrator has drained it: it claims nothing, is not counted on, and not stopped.
    drained: bool = False
    gpu: GpuHealth = HEALTHY
    #: What it serves while it runs, else what it would serve.
    serves: Serves = EVERYTHING
    #: The rest is for instances of other hosts, as their watchers publish it.
    hold: Hold = ""
    #: Why their watcher will not start it, or does not count on its start.
    excluded: str = ""
    #: Their watcher only logs decisions, and neither starts nor stops any.
    log_only: bool = False

    @property
    def told_exclusion(self) -> Exclusion | None:
        """Return the exclusion that another host's watcher has published."""
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
    #: Tasks of this queue that were settled, counted from any fixed moment on.
    done: int = 0
    #: How long the longest-waiting task has waited; 0 when none does.
    oldest_s: float = 0.0
    #: Tasks whose ETA comes before a worker that is started now could serve them.
    due: int = 0
    #: True: nothing is claimed from it until it is resumed.
    paused: bool = False

    def __add__(self, other: QueueState) -> QueueState:
        """Return two lanes together."""
        return QueueState(
            waiting=self.waiting + other.waiting,
            in_flight=self.in_flight + other.in_flight,
            done=self.done + other.done,
            oldest_s=max(self.oldest_s, other.oldest_s),
            due=self.due + other.due,
        )


@dataclass(frozen=True, slots=True)
class Stranded:
    """Tasks of a lane that no worker serves, and the command that starts one for them."""

    waiting: int
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one watcher has measured, as it is published to the others."""

    #: Tasks served and worker-seconds spent; None: nothing yet.
    served: float | None
    worked: Annotated[float, Field(gt=0)]
    #: False: the rate is a lower bound.
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
    #: Hosts whose watcher is alive. Instances of others may serve, but no watcher would start them.
    live_hosts: frozenset[str] = frozenset()
    dead_letters: int = 0
    #: Host with a live watcher -> part of the fleet -> what that watcher has measured there.
    figures: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)
    #: Tasks that active workers hold, by what those serve; None: all that are in flight.
    held: Mapping[Serves, int] | None = None
    #: True: decisions are carried out; else they are only logged.
    acts: bool = True
    #: Why Redis cannot be read.
    trouble: str = ""
    #: The process token of another watcher that uses our host's name; empty: there is none.
    rival: str = ""

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
    """How many workers the queues and rates of a demand ask for."""

    #: Start until this many run; at most as many as there are.
    desired: int = 0
    #: Workers beyond this may be stopped after a cooldown.
    minimum: int = 0
    #: Never stop below this: fewer would not drain in time what waits now.
    keep: int = 0
    #: How many are desired within floor and ceiling, even if there are fewer instances.
    unlimited: int = 0
    #: Why, with the numbers.
    cause: str = ""
