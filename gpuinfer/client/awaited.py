# SPDX-License-Identifier: Apache-2.0
"""The tasks that a caller waits for, and how publications about them are read. Does no I/O."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

from gpuinfer.client import tasks
from gpuinfer.client.origin import Origin
from gpuinfer.client.steps import Steps
from gpuinfer.errors import UnreadableResult
from gpuinfer.queue import keys, results
from gpuinfer.queue.results import TaskStatus

log = logging.getLogger(__name__)

#: Maximum number of states that one MGET reads.
MGET_MOST = 1000


class Waiting:
    """The tasks that a caller waits for, and what is known about them."""

    def __init__(
        self, task_ids: Iterable[str], origin: Origin, only: str | None = None, *, raw: bool = False
    ) -> None:
        """``only``: as in ``tasks``; ``raw``: as in ``results.parse``. Raises InputError for a bad id."""
        self._origin, self._only, self._raw = origin, only, raw
        #: Id -> whether Redis is known to have had it.
        self._known: dict[str, bool] = {}
        for task_id in task_ids:
            tasks.result_key(task_id)
            self._known[task_id] = False
        #: Ids for which Redis was asked whether they were ever submitted.
        self._asked: set[str] = set()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._known

    @property
    def ids(self) -> list[str]:
        """The ids of tasks that have not ended."""
        return list(self._known)

    def channels(self) -> list[str]:
        """Return the channels of their ends: this process's reply channel, and one per task of another."""
        others = [keys.result(task_id) for task_id in self._known if not self._origin.made(task_id)]
        return [self._origin.channel, *others] if len(others) < len(self._known) else others

    def told(self, status: TaskStatus) -> bool:
        """Tell whether this is the end of one of the tasks; if so, remove it."""
        ends = status.final and tasks.owned(status, self._only)
        return ends and self._known.pop(status.id, None) is not None

    def untold(self, statuses: Iterable[TaskStatus]) -> None:
        """Add tasks again whose ends were found but not returned, as the check was interrupted."""
        self._known.update((status.id, True) for status in statuses)

    def parts(self, task_ids: Sequence[str] = ()) -> Iterator[Sequence[str]]:
        """Yield these ids, or all, in parts for ``check``."""
        task_ids = task_ids or self.ids
        for start in range(0, len(task_ids), MGET_MOST):
            yield task_ids[start : start + MGET_MOST]

    def check(self, task_ids: Sequence[str], *, patient: bool) -> Steps[list[TaskStatus]]:
        """Read the states of these tasks; return those that have ended. Raises TaskNotFound.

        ``patient``: wait for an id that was never known, as it may be a plain Celery producer's task.
        """
        metas = self._visible(task_ids, (yield ("MGET", *map(keys.result, task_ids))))
        unknown = [
            task_id
            for task_id, meta in zip(task_ids, metas, strict=True)
            if meta is None and self._known.get(task_id) is False and task_id not in self._asked
            if not self._origin.made(task_id)
        ]
        if unknown:
            known = yield from tasks.known(unknown, self._only)
            self._asked.update(unknown)
            self._known.update((one, bool(was)) for one, was in zip(unknown, known, strict=False))
        return self._ended(task_ids, metas, patient=patient)

    def _visible(self, task_ids: Sequence[str], metas: Sequence[bytes | None]) -> Sequence[bytes | None]:
        """Return the states, with None for another caller's tasks. Raises UnreadableResult."""
        if self._only is None:
            return metas
        return [
            meta
            if meta is not None and tasks.owned(results.parse(task_id, meta, raw=True), self._only)
            else None
            for task_id, meta in zip(task_ids, metas, strict=True)
        ]

    def _ended(
        self, task_ids: Sequence[str], metas: Sequence[bytes | None], *, patient: bool
    ) -> list[TaskStatus]:
        """Return those of the tasks that have ended, by their states. Raises TaskNotFound."""
        ended = []
        for task_id, meta in zip(task_ids, metas, strict=True):
            if task_id not in self._known:
                continue
            if meta is None:
                if self._known[task_id] or self._origin.made(task_id):
                    raise tasks.gone(task_id)
                if patient:
                    continue
                raise tasks.not_found(task_id)
            self._known[task_id] = True
            status = results.parse(task_id, meta, raw=self._raw)
            if self.told(status):
                ended.append(status)
        return ended


def goes_on(task_id: str) -> Steps[bool]:
    """Tell whether a task whose failure was published has been sent again: its state is not final."""
    meta = yield "GET", keys.result(task_id)
    try:
        return meta is not None and not results.parse(task_id, meta).final
    except UnreadableResult:
        return False


def heard(channel: str, data: bytes, origin: Origin) -> list[TaskStatus] | None:
    """Read a publication; None: it cannot be read, so check the tasks' states instead.

    Any program may publish there, so an unreadable publication must not end a wait.
    """
    try:
        if channel == origin.channel:
            return results.parse_many(data)
        return [results.parse(channel.removeprefix(keys.RESULT_PREFIX), data)]
    except (UnreadableResult, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        fields = {"channel": channel, "reason": type(exc).__name__, "bytes": len(data)}
        log.warning(
            "Unreadable publication on %s: %s",
            *(channel, type(exc).__name__),
            extra={"action": "unreadable_publication", "fields": fields},
        )
        return None
