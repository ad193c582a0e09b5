# SPDX-License-Identifier: Apache-2.0
"""The tables of the screen: their columns, and which are left out first on a narrow terminal."""

from __future__ import annotations

from collections.abc import Sequence

from gpuinfer.view import words
from gpuinfer.view.columns import Cell, Column, fit
from gpuinfer.view.model import HostRow, QueueRow, Status, WorkerRow

_STATES = {
    "busy": "green",
    "idle": "",
    "draining": "yellow",
    "drained": "yellow",
    "starting": "cyan",
    "stopping": "yellow",
    "stopped": "dim",
    "masked": "dim",
    "failed": "bold red",
    "silent": "bold red",
}
#: Minimum width at which the models' versions are shown.
_WIDE = 110
#: A GPU as hot as this is marked (degrees Celsius).
_HOT_C = 85


def hosts(status: Status, width: int) -> list[list[Cell]]:
    """Return one row per host."""
    columns: list[Column[HostRow]] = [
        Column("host", lambda one: one.name, least=8),
        Column("watcher", _watcher, style=lambda one: "bold red" if one.watcher == "silent" else ""),
        Column("workers", lambda one: f"{one.running} of {one.instances}", right=True),
        Column("rate", lambda one: words.rate(_rate(status, one)), rank=1, right=True),
        Column("GPUs", lambda one: str(one.gpus) if one.gpus else words.NONE, rank=2, right=True),
    ]
    return fit(columns, status.hosts, width)


def _watcher(one: HostRow) -> str:
    return f"silent for {words.span(one.told_s)}" if one.watcher == "silent" else one.watcher


def _rate(status: Status, host: HostRow) -> float | None:
    if not host.running:
        return None
    return sum(one.rate or 0.0 for one in status.workers if one.host == host.name)


def chosen(workers: Sequence[WorkerRow], room: int | None) -> list[WorkerRow]:
    """Return the workers that fit: those with problems first, idle ones last."""
    if room is None or len(workers) <= room:
        return [*workers]
    urgent = sorted(workers, key=lambda one: (not (one.why or one.missing), one.state in ("idle", "stopped")))
    kept = {(one.host, one.number) for one in urgent[:room]}
    return [one for one in workers if (one.host, one.number) in kept]


def workers(status: Status, rows: Sequence[WorkerRow], width: int) -> list[list[Cell]]:
    """Return one row per worker, with its GPU where it has one."""
    several = len({one.host for one in status.workers}) > 1
    columns: list[Column[WorkerRow]] = [
        *([Column[WorkerRow]("host", lambda one: one.host, least=10)] if several else []),
        Column("worker", lambda one: str(one.number), right=True),
        Column("state", lambda one: one.state, style=lambda one: _STATES.get(one.state, "")),
        Column("rate", lambda one: words.rate(one.rate), right=True, rank=1),
        Column("busy", _busy, right=True, rank=3),
        Column("held", lambda one: str(one.in_flight) if one.in_flight else words.NONE, right=True, rank=6),
        Column("done", lambda one: words.count(one.done), right=True, rank=7),
        Column("GPU", lambda one: f"{one.gpu.index} {words.short(one.gpu.name)}" if one.gpu else "", rank=5),
        Column("memory", _memory, right=True, rank=4),
        Column("temp", _heat, right=True, rank=4, style=_hot),
        Column("serves", lambda one: _serves(one, versions=width >= _WIDE), least=12, rank=2),
        Column("queues", _tiers, rank=8),
    ]
    return fit(columns, rows, width)


def _busy(one: WorkerRow) -> str:
    known = one.busy if one.busy is not None else one.gpu.busy if one.gpu is not None else None
    return words.share(known)


def _memory(one: WorkerRow) -> str:
    if one.gpu is not None:
        return words.of(one.gpu.memory_used, one.gpu.memory_total)
    return words.size(one.memory)


def _heat(one: WorkerRow) -> str:
    return words.NONE if one.gpu is None or one.gpu.temperature_c is None else f"{one.gpu.temperature_c}°C"


def _hot(one: WorkerRow) -> str:
    return "bold red" if one.gpu is not None and (one.gpu.temperature_c or 0) >= _HOT_C else ""


def _serves(one: WorkerRow, *, versions: bool) -> str:
    """Return the models that a worker serves, or why it does not run."""
    if one.why:
        return one.why
    names = [f"{name} {version}".rstrip() if versions else name for name, version in one.models.items()]
    return ", ".join([*names, *(f"without {name}" for name in one.missing)])


def _tiers(one: WorkerRow) -> str:
    return "all" if len(one.queues) == 3 else ", ".join(one.queues)


def queues(status: Status, rows: Sequence[QueueRow], width: int) -> list[list[Cell]]:
    """Return one row per queue."""
    columns: list[Column[QueueRow]] = [
        Column("queue", lambda one: one.tier),
        Column("model", lambda one: one.model or "(default)", least=8),
        Column("waiting", lambda one: words.count(one.waiting), right=True),
        Column("oldest", lambda one: words.span(one.oldest_s), right=True, rank=1),
        Column("taken", lambda one: words.rate(one.rate), right=True, rank=2),
        Column("later", lambda one: words.count(one.later) if one.later else words.NONE, right=True, rank=3),
        Column("workers", lambda one: str(one.workers), right=True, rank=4),
        Column("", _mark, rank=1, style=lambda one: "bold yellow" if one.paused else "bold red"),
    ]
    return fit(columns, rows, width)


def _mark(one: QueueRow) -> str:
    if one.paused:
        return "paused"
    return "no worker" if one.waiting and not one.workers else ""
