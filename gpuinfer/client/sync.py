# SPDX-License-Identifier: Apache-2.0
"""The synchronous client: submit work, wait for results, cancel.

>>> client = Client("redis://127.0.0.1:6379/0")
>>> client.result(client.submit([0.0] * 64))

A wait is event-driven: it subscribes to the channel of a result, then reads the task's state once.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Self, Unpack

from redis.exceptions import AuthenticationError, ResponseError

from gpuinfer.client import calls, submissions, tasks
from gpuinfer.client.awaited import Waiting, goes_on, heard
from gpuinfer.client.calls import Call
from gpuinfer.client.driver import Driver, Unknown, introduce, refuse_key
from gpuinfer.client.listener import Listener, Listeners
from gpuinfer.client.origin import Origin
from gpuinfer.client.steps import SCRIPTS, Ask, Script, Steps, T, run
from gpuinfer.errors import BrokerError, InputError, WaitTimeout
from gpuinfer.queue import history, keys
from gpuinfer.queue.connection import AWAY, connect, explain
from gpuinfer.queue.direct import Direct
from gpuinfer.queue.options import Options, documented
from gpuinfer.queue.position import spot_of
from gpuinfer.queue.quota import Quota
from gpuinfer.queue.resource import Place, to_resource
from gpuinfer.queue.results import TaskStatus
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import Settings

#: Maximum results that may be published to an idle subscription, as nobody reads them.
UNHEARD = 1000


class Client(Driver):
    """Talks to the queue. Safe to share between threads.

    ``source`` is a broker URL, a Settings object, or None for this host's settings.
    """

    def __init__(self, source: Settings | str | None = None) -> None:
        super().__init__(source)
        self._redis = connect(self._settings.broker)
        self._direct = Direct(self._redis)
        self._submit = self._direct.bind("submit")
        self._submit_bulk = bind(self._redis, "submit")
        self._scripts = {name: self._direct.bind(name) for name in SCRIPTS}
        self._listeners = Listeners(self._redis.connection_pool)
        self._made_by = Origin()
        #: For each thread: the task that it last submitted by ``submit`` or ``submit_batch``, and when.
        self._last = threading.local()

    @property
    def _origin(self) -> Origin:
        if self._made_by.pid != os.getpid():  # after a fork; the parent keeps its own
            self._made_by = Origin()
        return self._made_by

    def close(self) -> None:
        """Close all connections."""
        self._listeners.close()
        self._direct.close()
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, ask: Ask) -> Any:
        """Ask Redis one thing. Raises redis-py's errors."""
        if isinstance(ask, Script):
            return self._scripts[ask.name](keys=ask.keys, args=ask.args)
        return self._direct.call(*ask)

    def _run(self, steps: Steps[T]) -> T:
        return run(steps, self._ask, self._errors)

    def _run_raw(self, steps: Steps[T]) -> T:
        """Run an operation. Raises redis-py's errors unchanged."""
        return run(steps, self._ask, nullcontext())

    # -- submitting -----------------------------------------------------------------------

    @documented
    def submit(self, inputs: Any, **options: Unpack[Options]) -> str:
        """Submit one input and return its task id.

        Raises InputError, PayloadTooLarge, UnknownModel, BrokerUnavailable.
        """
        return self._one(inputs, many=False, options=options)

    @documented
    def submit_batch(self, inputs: Any, **options: Unpack[Options]) -> str:
        """Submit a list, tuple or array of inputs as one job (``gpuinfer.batch_predict``); return its id."""
        return self._one(inputs, many=True, options=options)

    @documented
    def submit_many(self, inputs: Iterable[Any], **options: Unpack[Options]) -> list[str]:
        """Submit many inputs, each as its own task, in few round trips; return their ids in order.

        This is not atomic: if Redis becomes full or unreachable meanwhile, the error's ``accepted`` has the
        ids of the tasks that were accepted.
        """
        refuse_key(options)
        ready = self._run(self._ready(list(inputs), many=False, options=options))
        made = self._build_many(ready, options, self._origin)
        if len(made) > UNHEARD:  # their results would fill idle subscriptions that nobody reads
            self._listeners.close()
        accepted: list[str] = []
        parts = calls.bulk(made, self._settings.queue)
        try:
            with self._errors:
                if self._origin.to_tell():
                    self._run(introduce(self._origin))
                while some := calls.trip(parts):
                    calls.note(some, self._call(some), accepted)
        except BrokerError as exc:
            exc.accepted = tuple(accepted)
            raise
        return accepted

    def _call(self, some: Sequence[Call]) -> list[Any]:
        """Send bodies, then the calls of the script, in one round trip; return the answer or error of each
        call.
        """
        parts = []
        with self._redis.pipeline(transaction=False) as pipe:
            for call in some:
                first = len(pipe)
                for command in call.commands():
                    pipe.execute_command(*command)  # type: ignore[no-untyped-call]
                parts.append(slice(first, len(pipe) + 1))
                self._submit_bulk(keys=list(call.bodies), args=call.args, client=pipe)
            answers = pipe.execute(raise_on_error=False)
        return [calls.answer_of(*answers[part]) for part in parts]

    def _one(self, inputs: Any, *, many: bool, options: Options) -> str:
        began = time.monotonic()
        try:
            inputs = self._ready_now(inputs, many=many, options=options)
        except (Unknown, InputError):
            (inputs,) = self._run(self._ready([inputs], many=many, options=options))
        default = self._default.name
        task = submissions.build(inputs, many=many, origin=self._origin, default_model=default, **options)
        call = calls.one(task, self._settings.queue)
        with self._errors:
            if self._origin.to_tell():
                self._run(introduce(self._origin))
            if not call.bodies:
                holder: Any = self._submit(keys=(), args=call.args)
            else:
                (holder,) = self._call([call])
                if isinstance(holder, Exception):
                    raise holder
        self._last.task = task_id = str(holder.decode())
        self._last.at = began if task_id == task.id else -math.inf
        return task_id

    def _hears_all(self, listener: Listener, waiting: Waiting) -> bool:
        """Tell whether a subscription gets the ends of all awaited tasks, so that no state need be read.

        It does if it was active before the task was submitted, and has not been read since.
        """
        last = getattr(self._last, "task", "")
        return len(waiting) == 1 and last in waiting and listener.unread_since < self._last.at

    def cancel(self, task_id: str, *, only: str | None = None) -> bool:
        """Cancel a task that has not ended; return whether it was cancelled.

        ``only``: a caller; another caller's task is treated as unknown. None: any task may be cancelled.

        A batch that is on the device runs to its end; nothing else of the task runs, and its result is
        dropped. An unknown id may be a waiting task of a plain Celery producer, so it is cancelled too,
        unless Redis is full (QueueFull). Raises InputError, TaskNotFound for another caller's task,
        BrokerError.
        """
        return self._run(tasks.cancel(task_id, self._origin, self._settings.queue, only))

    def retry(self, task_id: str, *, only: str | None = None, quota: Quota | None = None) -> None:
        """Send a task that failed, or is a dead letter, to its queue again, with the same id. ``only``: as in
        ``cancel``; ``quota``: that caller's quota.

        Raises WrongState for a task that is neither, or whose inputs are no longer kept; TaskNotFound;
        InputError for one that can never run; RateLimited, KeyQuota, BrokerError.
        """
        self._run(tasks.retry(task_id, self._origin, only, quota))

    def forget(self, task_id: str, *, only: str | None = None) -> None:
        """Delete a task that has ended: its result, and its inputs, if they are kept for a retry.

        ``only``: as in ``cancel``.

        Raises WrongState if it has not ended; TaskNotFound, InputError, BrokerError.
        """
        self._run(tasks.forget(task_id, self._origin, only))

    # -- finding tasks --------------------------------------------------------------------

    def task(self, task_id: str, *, only: str | None = None) -> dict[str, Any]:
        """Return a task as ``GET /tasks/{id}`` shows it: status, model, times, attempt, metrics, worker,
        result or error, metadata, and while it waits its position. ``only``: as in ``status``.

        Raises InputError, TaskNotFound (ResultGone if it has expired), UnreadableResult, BrokerError.
        """
        status = self.status(task_id, only=only)
        return to_resource(status, self.place(status) if status.state == "queued" else None)

    def tasks(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        before: str | float | None = None,
        limit: int = history.USUAL,
        only: str | None = None,
    ) -> history.Page:
        """Return a page of tasks that have ended, the newest first: from the last 10,000, or with
        ``status="failed"`` from up to 100,000 of a day. ``before``: that of the previous page, or a time;
        ``only``: tasks of this caller, and those without a caller.

        Raises InputError, BrokerUnavailable.
        """
        search = history.Search(status=status, model=model, before=before, limit=limit, only=only)
        return self._run(tasks.find(search))

    # -- waiting --------------------------------------------------------------------------

    def status(self, task_id: str, *, only: str | None = None) -> TaskStatus:
        """Return a task's state now. ``only``: a caller; another caller's task is treated as unknown.

        Raises InputError, TaskNotFound, UnreadableResult.
        """
        return self._run(tasks.status(task_id, self._origin, only))

    def place(self, status: TaskStatus) -> Place | None:
        """Return an estimate of a waiting task's position in its list; None if it is unknown.

        Raises BrokerError.
        """
        spot = spot_of(status)
        if spot is None:
            return None
        with self._errors:
            length = int(self._direct.call("LLEN", spot.list))
            claimed = int(self._direct.call("HGET", keys.CLAIMED, spot.counter) or 0)
        return spot.place(length, claimed, time.time())

    def wait(self, task_id: str, timeout_s: float | None = None, *, only: str | None = None) -> TaskStatus:
        """Wait until a task has ended, at most ``timeout_s`` seconds; return its state. ``only``: as in
        ``status``.

        An unknown id may be a waiting task of a plain Celery producer: if there is a timeout, wait for it.
        Raises InputError, TaskNotFound, BrokerError.
        """
        if timeout_s is None or timeout_s > 0:
            with suppress(WaitTimeout):
                for status in self._completed(Waiting([task_id], self._origin, only), timeout_s):
                    return status
        return self.status(task_id, only=only)

    def result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """Wait for a task, as ``wait`` does, and return its result or raise its error.

        Raises TaskNotFound, WaitTimeout.
        """
        for status in self.as_completed([task_id], timeout_s):
            return status.unwrap()
        raise AssertionError("unreachable: as_completed yields or raises")  # pragma: no cover

    def results(
        self, task_ids: Sequence[str], timeout_s: float | None = None, *, return_errors: bool = False
    ) -> list[Any]:
        """Wait for tasks and return their results in order.

        Raises the first error; with ``return_errors``, errors are in the list instead.
        """
        found = {status.id: status for status in self.as_completed(task_ids, timeout_s)}
        ordered = [found[task_id] for task_id in task_ids]
        if return_errors:
            return [status.error or status.result for status in ordered]
        return [status.unwrap() for status in ordered]

    def as_completed(self, task_ids: Iterable[str], timeout_s: float | None = None) -> Iterator[TaskStatus]:
        """Yield the final status of each task as it ends. Raises TaskNotFound, WaitTimeout.

        With a timeout, unknown ids are waited for, as in ``wait``. Continues after a restart of Redis; raises
        BrokerUnavailable if Redis refuses the password.
        """
        yield from self._completed(Waiting(task_ids, self._origin), timeout_s)

    def _completed(self, waiting: Waiting, timeout_s: float | None) -> Iterator[TaskStatus]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        cut_off = False
        while waiting:
            try:
                yield from self._listen(waiting, deadline)
            except AWAY as exc:
                if isinstance(exc, AuthenticationError):
                    raise explain(exc, self._user) from exc
                if not cut_off:  # perhaps only an idle subscription was closed: retry at once with a new one
                    cut_off = True
                    self._listeners.close()
                    continue
                if deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeout(
                        f"Redis is away and {len(waiting)} tasks have not ended: {exc}"
                    ) from exc
                time.sleep(0.2)
            except ResponseError as exc:
                raise explain(exc, self._user) from exc

    def _listen(self, waiting: Waiting, deadline: float | None) -> Iterator[TaskStatus]:
        """Subscribe, read states once, then yield published ends; remove ended tasks from ``waiting``.

        States are read once the subscriptions are active, so that no end can be missed between the two.
        """
        origin = self._origin
        with self._listeners.lend(waiting) as listener:
            listener.subscribe(waiting.channels())
            hears_all = self._hears_all(listener, waiting)
            while waiting:
                left = 5.0 if deadline is None else max(0.0, deadline - time.monotonic())
                event = listener.next(min(left, 5.0))
                if event is None:
                    if deadline is not None and time.monotonic() >= deadline:
                        yield from self._check(waiting)
                        if waiting:
                            raise WaitTimeout(f"{len(waiting)} tasks have not ended in time; they continue")
                    continue
                channel, told = event
                if told is None and hears_all:
                    continue
                statuses = None if told is None else heard(channel, told, origin)
                if statuses is None:
                    yield from self._check(waiting, patient=deadline is not None and left > 0)
                    continue
                for status in statuses:
                    if status.state == "failed" and not hears_all and self._run_raw(goes_on(status.id)):
                        continue
                    if waiting.told(status):
                        yield status
                    elif status.id in waiting:  # only a notice: the end itself is under the task's key
                        yield from self._check(waiting, [status.id])

    def _check(
        self, waiting: Waiting, ids: Sequence[str] = (), *, patient: bool = False
    ) -> Iterator[TaskStatus]:
        """Yield the tasks that have ended, of all or of ``ids``. Raises TaskNotFound; redis-py's errors."""
        for part in waiting.parts(ids):
            yield from self._run_raw(waiting.check(part, patient=patient))
