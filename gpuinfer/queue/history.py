# SPDX-License-Identifier: Apache-2.0
"""Tasks that have ended: the last 10,000, and up to 100,000 that failed within a day.

The script that writes the ends of a batch adds them to two lists, the newest first: id, outcome, queue and
model, time, class of the error, and caller. Results have keys of their own, and expire independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from gpuinfer import errors
from gpuinfer.errors import GpuinferError, InputError
from gpuinfer.queue.options import OPTIONS
from gpuinfer.queue.resource import urls, written
from gpuinfer.queue.results import moment

Status = Literal["completed", "failed", "expired", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
#: Tasks per page: default, and maximum.
USUAL, MOST = 100, 1000
#: Maximum entries per call of the script, and per search; the next page continues the search.
LOOK, SEARCHED = 1000, 20_000
#: Failures are listed for this long.
DAY_S = 86400.0

#: Outcome in Redis -> status.
_OUTCOMES: dict[str, Status] = {
    "completed": "completed",
    "failed": "failed",
    "dead": "failed",
    "not_run": "failed",
    "expired": "expired",
    "cancelled": "cancelled",
}


class Ended(NamedTuple):
    """A task that has ended."""

    id: str
    status: Status
    #: Tier and model; empty: not known, for example of a task that was cancelled while it waited.
    queue: str
    model: str
    #: When it ended, in microseconds since the epoch by Redis's clock; unique in the history.
    at: int
    #: The code of a failed task's error; empty for others.
    error: str
    #: Its caller; empty: none.
    caller: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "id": self.id,
            "status": self.status,
            "queue": self.queue or None,
            "model": self.model or None,
            "completed_at": written(self.at / 1e6),
            **({"error": {"code": self.error}} if self.error else {}),
            "urls": urls(self.id),
        }


class Page(NamedTuple):
    """One page of ended tasks, the newest first."""

    tasks: list[Ended]
    #: The value of ``before`` for the next page; None: this is the last page.
    before: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"tasks": [task.to_dict() for task in self.tasks], "before": self.before}


class Search:
    """Collects one page from calls of the script ``history`` until it is full. Does no I/O itself."""

    def __init__(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        before: str | float | None = None,
        limit: int = USUAL,
        only: str | None = None,
    ) -> None:
        """``before``: seconds since the epoch, or ISO 8601; ``only``: show this caller's tasks and those
        without a caller. Raises InputError naming the field.
        """
        if status is not None and status not in STATUSES:
            raise InputError(f"must be one of {', '.join(STATUSES)}, got {status!r:.80}", "status")
        if model is not None and (wrong := OPTIONS["model"].wrong(model)):
            raise InputError(f"must be {wrong}, got {model!r:.80}", "model")
        if type(limit) is not int or not 1 <= limit <= MOST:
            raise InputError(f"must be an integer from 1 to {MOST}, got {limit!r:.80}", "limit")
        self._status, self._model, self._limit = status, model, limit
        self._callers = None if only is None else ("", only)
        self._before = None if before is None else _microseconds(before)
        self._searched = 0
        self.done = False
        self._found: list[Ended] = []
        self._more = False

    @property
    def args(self) -> list[str | int]:
        """The arguments of the next call of the script."""
        before = "" if self._before is None else self._before
        return [int(self._status == "failed"), before, LOOK]

    def take(self, entries: Sequence[bytes], now: float) -> None:
        """Add the entries that a call returned. ``now``: seconds since the epoch."""
        oldest = (now - DAY_S) * 1e6 if self._status == "failed" else 0.0
        for entry in entries:
            ended = _parse(entry)
            if ended is None:
                continue
            if ended.at < oldest:
                self.done, self._more = True, False
                return
            self._before = ended.at
            if self._callers is not None and ended.caller not in self._callers:
                continue
            if self._status in (None, ended.status) and self._model in (None, ended.model):
                self._found.append(ended)
                if len(self._found) == self._limit:
                    self.done = self._more = True
                    return
        self._searched += len(entries)
        self._more = len(entries) == LOOK
        self.done = not self._more or self._searched >= SEARCHED

    @property
    def page(self) -> Page:
        """The tasks found."""
        before = f"{self._before // 1_000_000}.{self._before % 1_000_000:06d}" if self._before else None
        return Page(self._found, before if self._more else None)


def _microseconds(before: str | float) -> int:
    text = str(before)
    seconds, _, rest = text.partition(".")
    if seconds.isdecimal() and len(seconds) <= 12 and (not rest or rest.isdecimal()):
        return int(seconds) * 1_000_000 + int((rest + "000000")[:6])
    found = moment(text)
    if found is None:
        raise InputError(
            f"must be a time in ISO 8601 or in seconds since the epoch, got {text[:80]!r}", "before"
        )
    return round(found.timestamp() * 1e6)


def _parse(entry: bytes) -> Ended | None:
    """Read an entry of the history; None if it is malformed."""
    head, _, rest = entry.decode(errors="backslashreplace").partition("\n")
    task_id, error, caller = (*rest.split("\n", 2), "", "")[:3]
    at, outcome, queue, model = (*head.split(" ", 3), "", "", "", "")[:4]
    status = _OUTCOMES.get(outcome)
    if not at.isdecimal() or status is None or not task_id:
        return None
    return Ended(task_id, status, queue, model, int(at), _code(error), caller)


def _code(name: str) -> str:
    """Return the code of an error by the name of its class."""
    if not name:
        return ""
    cls = getattr(errors, name, None)
    return cls.code if isinstance(cls, type) and issubclass(cls, GpuinferError) else errors.TaskFailed.code
