# SPDX-License-Identifier: Apache-2.0
"""The lists of ``gpuinfer top``: their columns, their order, and filters. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gpuinfer.view import words
from gpuinfer.view.actions import TaskRow
from gpuinfer.view.model import QueueRow, Status, WorkerRow

Row = TypeVar("Row")


@dataclass(frozen=True)
class Field(Generic[Row]):
    """One column."""

    name: str
    #: Row -> its text.
    text: Callable[[Row], str]
    #: Row -> its sort key; None: its text.
    by: Callable[[Row], Any] | None = None
    right: bool = False

    def key(self, row: Row) -> Any:
        """Return the sort key of a row; unknown values come last."""
        value = self.text(row).lower() if self.by is None else self.by(row)
        return (value is None, value if value is not None else 0)


@dataclass(frozen=True)
class Listing(Generic[Row]):
    """One list."""

    #: Row -> its identity over updates.
    name: Callable[[Row], str]
    fields: Sequence[Field[Row]]

    def arranged(self, rows: Sequence[Row], filter_: str, column: int, reverse: bool) -> list[Row]:
        """Return the rows that contain all words of the filter, sorted; column -1: in the given order."""
        wanted = filter_.lower().split()
        found = [row for row in rows if all(word in self._all(row) for word in wanted)]
        if column < 0:
            return found
        field = self.fields[column % len(self.fields)]
        known = [row for row in found if not field.key(row)[0]]
        rest = [row for row in found if field.key(row)[0]]
        return [*sorted(known, key=field.key, reverse=reverse), *rest]

    def _all(self, row: Row) -> str:
        return " ".join(field.text(row) for field in self.fields).lower()


def worker_name(one: WorkerRow) -> str:
    """Return a worker's name in Redis."""
    return f"gpu{one.number}@{one.host}"


def queue_name(one: QueueRow) -> str:
    """Return a queue's name, as ``gpuinfer queue pause`` takes it."""
    return f"{one.tier}.{one.model}".rstrip(".")


def _busy(one: WorkerRow) -> float | None:
    return one.busy if one.busy is not None else one.gpu.busy if one.gpu is not None else None


#: Maximum characters of why a worker is excluded, so that the following columns stay visible.
_MOST_WHY = 48


def _serves(one: WorkerRow) -> str:
    if one.why:  # the problems above show the full text
        return words.cut(one.why, _MOST_WHY)
    names = [f"{name} {version}".rstrip() for name, version in one.models.items()]
    return ", ".join([*names, *(f"without {name}" for name in one.missing)])


def workers(status: Status) -> Listing[WorkerRow]:
    """Return the list of workers, with columns for GPUs if there are any."""
    gpus: list[Field[WorkerRow]] = [
        Field(
            "memory",
            lambda one: words.of(one.gpu.memory_used, one.gpu.memory_total) if one.gpu else words.NONE,
            lambda one: one.gpu.memory_used if one.gpu else None,
            right=True,
        ),
        Field(
            "temp",
            lambda one: f"{one.gpu.temperature_c}°C" if one.gpu and one.gpu.temperature_c else words.NONE,
            lambda one: one.gpu.temperature_c if one.gpu else None,
            right=True,
        ),
    ]
    named: list[Field[WorkerRow]] = [
        Field("GPU", lambda one: f"{one.gpu.index} {words.short(one.gpu.name)}" if one.gpu else "")
    ]
    return Listing(
        worker_name,
        [
            Field("host", lambda one: one.host),
            Field("worker", lambda one: str(one.number), lambda one: one.number, right=True),
            Field("state", lambda one: one.state),
            Field("rate", lambda one: words.rate(one.rate), lambda one: one.rate, right=True),
            Field("busy", lambda one: words.share(_busy(one)), _busy, right=True),
            *(gpus if status.has_gpus else []),
            Field("serves", _serves),
            Field("held", lambda one: str(one.in_flight), lambda one: one.in_flight, right=True),
            Field("done", lambda one: words.count(one.done), lambda one: one.done, right=True),
            *(named if status.has_gpus else []),
        ],
    )


QUEUES: Listing[QueueRow] = Listing(
    queue_name,
    [
        Field("queue", lambda one: one.tier),
        Field("model", lambda one: one.model or "(default)"),
        Field("waiting", lambda one: words.count(one.waiting), lambda one: one.waiting, right=True),
        Field("oldest", lambda one: words.span(one.oldest_s), lambda one: one.oldest_s, right=True),
        Field("taken", lambda one: words.rate(one.rate), lambda one: one.rate, right=True),
        Field("later", lambda one: words.count(one.later), lambda one: one.later, right=True),
        Field("workers", lambda one: str(one.workers), lambda one: one.workers, right=True),
        Field("", lambda one: "paused" if one.paused else ""),
    ],
)
TASKS: Listing[TaskRow] = Listing(
    lambda one: one.id,
    [
        Field("ended", lambda one: one.at),
        Field("status", lambda one: one.status),
        Field("queue", lambda one: one.queue),
        Field("model", lambda one: one.model),
        Field("error", lambda one: one.error),
        Field("task", lambda one: one.id),
    ],
)
