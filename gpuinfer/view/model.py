# SPDX-License-Identifier: Apache-2.0
"""The status of a fleet: times in seconds, sizes in bytes, shares from 0 to 1; None: not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: The worst first.
Severity = Literal["error", "warning"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning")
#: Exit codes of ``gpuinfer status``, as of monitoring plug-ins.
EXIT_OK, EXIT_WARNING, EXIT_ERROR = 0, 1, 2
#: The outcomes under which ended tasks are counted, in the order of the screen.
OUTCOMES = ("completed", "failed", "dead", "not_run", "expired", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One problem, and the command that fixes it."""

    severity: Severity
    what: str
    #: Empty if no command fixes it.
    remedy: str = ""
    #: The doctor's check that found it; empty: found by ``status`` itself.
    check: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """The GPU of a worker, as reported by its host's watcher or this host's driver."""

    index: int
    name: str = ""
    memory_used: int | None = None
    memory_total: int | None = None
    temperature_c: int | None = None
    #: The share of time in which some program ran on it.
    busy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """One worker, running or not."""

    number: int
    host: str
    #: idle, busy, draining, drained; starting, stopping, stopped, failed, masked, silent.
    state: str
    #: Why it is excluded; empty otherwise.
    why: str = ""
    #: Loaded model -> its version; empty: unknown.
    models: Mapping[str, str] = field(default_factory=dict)
    #: Model that it failed to load -> why.
    missing: Mapping[str, str] = field(default_factory=dict)
    queues: Sequence[str] = ()
    #: Tasks ended since its start, and tasks per second in its last heartbeat.
    done: int | None = None
    rate: float | None = None
    in_flight: int = 0
    #: The share of time in which its device computed.
    busy: float | None = None
    #: Bytes of the host's memory.
    memory: int | None = None
    device: str = ""
    gpu: GpuRow | None = None
    #: Its start, in seconds since the epoch.
    since: float | None = None
    version: str = ""

    @property
    def alive(self) -> bool:
        """Tell whether it sends heartbeats."""
        return self.state not in ("starting", "stopping", "stopped", "failed", "masked", "silent")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRow:
    """The tasks that wait for one model in one tier."""

    tier: str
    model: str
    waiting: int = 0
    #: Tasks that wait for their ETA.
    later: int = 0
    oldest_s: float | None = None
    #: Tasks that workers claim per second.
    rate: float | None = None
    paused: bool = False
    #: Live workers that serve it.
    workers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """One host of the fleet."""

    name: str
    #: acts, logs (only logs its decisions), silent, or none.
    watcher: str
    #: Seconds since the last report of its watcher.
    told_s: float | None = None
    #: Workers that send heartbeats, and all instances.
    running: int = 0
    instances: int = 0
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisRow:
    """The broker."""

    place: str
    reachable: bool
    version: str = ""
    memory_used: int | None = None
    memory_max: int | None = None
    clients: int | None = None
    up_s: int | None = None
    evicted: int | None = None
    #: always, everysec, no, off; empty: this user may not ask.
    appendfsync: str = ""
    means: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One number over time."""

    name: str
    unit: str
    #: One value per step, the oldest first; None: not measured.
    values: Sequence[float | None]
    step_s: float
    #: The last measured value, over 10 s; the values of steps are means.
    now: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of the fleet at one moment."""

    #: Seconds since the epoch, by Redis's clock if it answers.
    at: float
    #: This host, and the version of this program.
    host: str
    version: str
    troubles: Sequence[Trouble] = ()
    hosts: Sequence[HostRow] = ()
    workers: Sequence[WorkerRow] = ()
    queues: Sequence[QueueRow] = ()
    redis: RedisRow
    #: Outcome -> all tasks that ended with it, in all queues and models; None: this user may not read it.
    ended: Mapping[str, int] | None = None
    #: The same by ``tier.model``.
    ended_by_queue: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    dead_letters: int | None = None
    default_model: str = ""
    #: The span of the curves in seconds, and why there are none.
    since_s: float = 3600.0
    curves: Sequence[Curve] = ()
    no_curves: str = ""
    #: Who may connect, one line per server.
    access: Sequence[str] = ()
    #: The watchers' last decision, as a sentence.
    decided: str = ""

    @property
    def severity(self) -> Severity | None:
        """Return the worst severity."""
        found = {trouble.severity for trouble in self.troubles}
        return next((one for one in SEVERITIES if one in found), None)

    @property
    def exit_code(self) -> int:
        """0: all is well; 1: warnings; 2: an error."""
        return {None: EXIT_OK, "warning": EXIT_WARNING, "error": EXIT_ERROR}[self.severity]

    @property
    def has_gpus(self) -> bool:
        """Whether any worker of the fleet has a GPU."""
        return any(worker.gpu is not None for worker in self.workers)

    @property
    def waiting(self) -> int:
        """Return the number of waiting tasks."""
        return sum(queue.waiting for queue in self.queues)

    @property
    def in_flight(self) -> int:
        """Return the number of tasks in flight."""
        return sum(worker.in_flight for worker in self.workers)

    @property
    def rate(self) -> float:
        """Return the tasks ended per second by all workers."""
        return sum(worker.rate or 0.0 for worker in self.workers)

    def to_dict(self) -> dict[str, Any]:
        """Return the status for JSON."""
        body = asdict(self)
        totals = {"waiting": self.waiting, "in_flight": self.in_flight, "rate": round(self.rate, 3)}
        return {"status": self.severity or "ok", "exit_code": self.exit_code} | totals | body
