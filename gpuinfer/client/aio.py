# SPDX-License-Identifier: Apache-2.0
"""The asyncio client. All waits of a client share one subscription connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Self, Unpack

from redis.exceptions import RedisError

from gpuinfer.client import calls, submissions, tasks
from gpuinfer.client.aio_fleet import AsyncFleet
from gpuinfer.client.awaited import Waiting, goes_on
from gpuinfer.client.calls import Accepted, Call
from gpuinfer.client.driver import Unknown, introduce, refuse_key
from gpuinfer.client.origin import Origin
from gpuinfer.client.outgoing import Outgoing
from gpuinfer.client.steps import arun
from gpuinfer.client.subscription import RETRY_S
from gpuinfer.client.waits import Waits, Watch
from gpuinfer.errors import BrokerError, BrokerUnavailable, InputError, KeyQuota, RateLimited, WaitTimeout
from gpuinfer.queue import history, keys
from gpuinfer.queue.options import Options, documented
from gpuinfer.queue.position import spot_of
from gpuinfer.queue.quota import Quota, Refusals
from gpuinfer.queue.resource import Place, to_resource
from gpuinfer.queue.results import TaskStatus
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import Settings


def _retrieve(answer: asyncio.Future[Any]) -> None:
    """Mark an exception that nobody awaits as retrieved, as asyncio would log it otherwise."""
    if not answer.cancelled():
        answer.exception()


class AsyncClient(AsyncFleet):
    """Talks to the queue from an event loop. Use it only in the loop in which it was first used.

    ``source`` is a broker URL, a Settings object, or None for this host's settings.
    """

    def __init__(self, source: Settings | str | None = None) -> None:
        super().__init__(source)
        self._submit = self._pipe.script("submit")
        self._outgoing = Outgoing(self._call, self._settings.queue)
        #: Counts of requests that were refused because of callers' quotas.
        self.refusals = Refusals()
        self._origin = Origin()
        self._waits = Waits(self._redis, self._origin, self._user)

    async def aclose(self) -> None:
        """Stop listening and close all connections."""
        await self._waits.aclose()
        await self._pipe.aclose()
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- finding tasks --------------------------------------------------------------------

    async def task(self, task_id: str, *, only: str | None = None) -> dict[str, Any]:
        """Return a task as ``GET /tasks/{id}`` shows it: status, model, times, attempt, metrics, worker,
        result or error, metadata, and while it waits its position. ``only``: as in ``status``.

        Raises InputError, TaskNotFound (ResultGone if it has expired), UnreadableResult, BrokerError.
        """
        status = await self.status(task_id, only=only)
        return to_resource(status, await self.place(status) if status.state == "queued" else None)

    async def tasks(
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
        return await self._run(tasks.find(search))

    # -- submitting -----------------------------------------------------------------------

    @documented
    async def submit(self, inputs: Any, **options: Unpack[Options]) -> str:
        """Submit one input and return its task id.

        Raises InputError, PayloadTooLarge, UnknownModel, BrokerUnavailable.
        """
        return await self._one(inputs, many=False, options=options)

    @documented
    async def submit_batch(self, inputs: Any, **options: Unpack[Options]) -> str:
        """Submit a list, tuple or array of inputs as one job (``gpuinfer.batch_predict``); return its id."""
        return await self._one(inputs, many=True, options=options)

    @documented
    async def submit_many(self, inputs: Iterable[Any], **options: Unpack[Options]) -> list[str]:
        """Submit many inputs, each as its own task, in few round trips; return their ids in order.

        This is not atomic: if Redis becomes full or unreachable meanwhile, the error's ``accepted`` has the
        ids of the tasks that were accepted.
        """
        refuse_key(options)
        ready = await self._run(self._ready(list(inputs), many=False, options=options))
        made = self._build_many(ready, options, self._origin)
        accepted: list[str] = []
        parts = calls.bulk(made, self._settings.queue)
        try:
            with self._errors:
                if self._origin.to_tell():
                    await self._run(introduce(self._origin))
                while some := calls.trip(parts):
                    answers = await asyncio.gather(*map(self._call, some), return_exceptions=True)
                    calls.note(some, answers, accepted)
        except BrokerError as exc:
            exc.accepted = tuple(accepted)
            raise
        return accepted

    async def _one(self, inputs: Any, *, many: bool, options: Options) -> str:
        return await self.send(await self.prepare(inputs, many=many, options=options))

    async def prepare(
        self,
        inputs: Any,
        *,
        many: bool,
        options: Options,
        task_id: str | None = None,
        caller: str = "",
        quota: Quota | None = None,
    ) -> Submission:
        """Return a checked task for ``send``. It has an id, so its end can be watched before it is sent.

        Inputs may be ``Json``. ``task_id``: an id chosen by the caller. ``caller``: the owner, by the name of
        its key; ``quota``: the caller's quota. Raises InputError, BrokerError.
        """
        try:  # usually the model's signature is known
            inputs = self._ready_now(inputs, many=many, options=options)
        except (Unknown, InputError):
            (inputs,) = await self._run(self._ready([inputs], many=many, options=options))
        return submissions.build(
            inputs,
            many=many,
            origin=self._origin,
            default_model=self._default.name,
            task_id=task_id,
            caller=caller,
            quota=quota,
            **options,
        )

    async def send(self, task: Submission) -> str:
        """Submit a task, together with others of this turn of the event loop. Returns its id, or that of an
        earlier task with its idempotency key.

        Sets ``task.rate`` to the state of the caller's rate limit, if any. Raises InputError,
        PayloadTooLarge, UnknownModel, RateLimited, KeyQuota, BrokerError.
        """
        try:
            with self._errors:
                if self._origin.to_tell():
                    await self._run(introduce(self._origin))
                if not task.key:
                    task.rate = await self._outgoing.put(calls.pack(task, self._settings.queue))
                    return task.id
                holder, task.rate = await self._call(calls.one(task, self._settings.queue))
        except (RateLimited, KeyQuota) as exc:
            self.refusals.note(task.caller, exc)
            raise
        return holder

    async def _call(self, call: Call) -> Accepted:
        """Send the bodies and the call of the script in one packet; return its answer."""
        bodies = [self._pipe.call(*command) for command in call.commands()]
        for body in bodies:
            body.add_done_callback(_retrieve)
        try:
            return calls.accepted(await self._submit(list(call.bodies), call.args))
        except RedisError as exc:
            found = calls.answer_of(*await asyncio.gather(*bodies, return_exceptions=True), exc)
            raise found from None

    async def cancel(self, task_id: str, *, only: str | None = None) -> bool:
        """Cancel a task that has not ended; return whether it was cancelled.

        ``only``: a caller; another caller's task is treated as unknown. None: any task may be cancelled.

        A batch that is on the device runs to its end; nothing else of the task runs, and its result is
        dropped. An unknown id may be a waiting task of a plain Celery producer, so it is cancelled too,
        unless Redis is full (QueueFull). Raises InputError, TaskNotFound for another caller's task,
        BrokerError.
        """
        return await self._run(tasks.cancel(task_id, self._origin, self._settings.queue, only))

    async def retry(self, task_id: str, *, only: str | None = None, quota: Quota | None = None) -> None:
        """Send a task that failed, or is a dead letter, to its queue again, with the same id. ``only``: as in
        ``cancel``; ``quota``: that caller's quota.

        Raises WrongState for a task that is neither, or whose inputs are no longer kept; TaskNotFound;
        InputError for one that can never run; RateLimited, KeyQuota, BrokerError.
        """
        try:
            await self._run(tasks.retry(task_id, self._origin, only, quota))
        except (RateLimited, KeyQuota) as exc:
            self.refusals.note(only or "", exc)
            raise

    async def forget(self, task_id: str, *, only: str | None = None) -> None:
        """Delete a task that has ended: its result, and its inputs, if they are kept for a retry.

        ``only``: as in ``cancel``.

        Raises WrongState if it has not ended; TaskNotFound, InputError, BrokerError.
        """
        await self._run(tasks.forget(task_id, self._origin, only))

    # -- waiting --------------------------------------------------------------------------

    async def status(self, task_id: str, *, only: str | None = None) -> TaskStatus:
        """Return a task's state now. ``only``: a caller; another caller's task is treated as unknown.

        Raises InputError, TaskNotFound, UnreadableResult.
        """
        return await self._run(tasks.status(task_id, self._origin, only))

    async def place(self, status: TaskStatus) -> Place | None:
        """Return an estimate of a waiting task's position in its list; None if it is unknown.

        Raises BrokerError.
        """
        spot = spot_of(status)
        if spot is None:
            return None
        with self._errors:
            length, claimed = await asyncio.gather(
                self._pipe.call("LLEN", spot.list), self._pipe.call("HGET", keys.CLAIMED, spot.counter)
            )
        return spot.place(int(length), int(claimed or 0), time.time())

    async def wait(
        self, task_id: str, timeout_s: float | None = None, *, only: str | None = None
    ) -> TaskStatus:
        """Wait until a task has ended, at most ``timeout_s`` seconds; return its state. ``only``: as in
        ``status``.

        An unknown id may be a waiting task of a plain Celery producer: if there is a timeout, wait for it.
        Raises InputError, TaskNotFound, BrokerError.
        """
        if timeout_s is not None and timeout_s <= 0:
            return await self.status(task_id, only=only)
        try:
            with self.watch(task_id) as watch:
                async with asyncio.timeout(timeout_s):
                    return await self.ended(task_id, watch, patient=timeout_s is not None, only=only)
        except TimeoutError:
            return await self.status(task_id, only=only)

    def watch(self, task_id: str) -> Watch:
        """Start to listen for a task's end, for ``ended``. Raises InputError."""
        tasks.result_key(task_id)
        return self._waits.watch((task_id,))

    async def ended(
        self,
        task_id: str,
        watch: Watch,
        *,
        patient: bool = False,
        submitted: bool = False,
        only: str | None = None,
        raw: bool = False,
    ) -> TaskStatus:
        """Wait for a task's end, without a limit.

        ``patient``: wait even if the id is unknown. ``submitted``: the task was watched before it was sent,
        so its state need not be read first. ``only``: as in ``status``; ``raw``: as in ``results.parse``.
        Raises TaskNotFound, BrokerError.
        """
        waiting = Waiting((task_id,), self._origin, only, raw=raw)
        ended = [] if submitted else await self._check(waiting, patient=patient)
        while not ended:
            ended = await self._next(watch, waiting, patient=patient, again=not submitted)
        return ended[0]

    async def result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """Wait for a task, as ``wait`` does, and return its result or raise its error.

        Raises TaskNotFound, WaitTimeout.
        """
        status = await self.wait(task_id, timeout_s)
        if not status.final:
            raise WaitTimeout(f"task {task_id} has not ended in {timeout_s:g} s; it continues")
        return status.unwrap()

    async def as_completed(
        self, task_ids: Iterable[str], timeout_s: float | None = None
    ) -> AsyncIterator[TaskStatus]:
        """Yield the final status of each task as it ends. Raises TaskNotFound, WaitTimeout.

        With a timeout, unknown ids are waited for, as in ``wait``. Continues after a restart of Redis; raises
        BrokerUnavailable if Redis is away at the start.
        """
        waiting = Waiting(task_ids, self._origin)
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        patient, began = deadline is not None, False
        with self._waits.watch(waiting.ids) as watch:
            while waiting:
                try:
                    async with asyncio.timeout_at(deadline):
                        if began:
                            ended = await self._next(watch, waiting, patient=patient)
                        else:  # raises if Redis is away; later checks wait for it
                            began = True
                            ended = await self._check(waiting, patient=patient)
                except TimeoutError:
                    ended = await self._check(waiting, patient=False)
                    if waiting and not ended:
                        raise WaitTimeout(
                            f"{len(waiting)} tasks have not ended in time; they continue"
                        ) from None
                for status in ended:
                    yield status

    async def _goes_on(self, task_id: str) -> bool:
        """Tell whether a task whose failure was published has been sent again."""
        with suppress(RedisError):
            return await arun(goes_on(task_id), self._ask, nullcontext())
        return False

    async def _next(
        self, watch: Watch, waiting: Waiting, *, patient: bool, again: bool = True
    ) -> list[TaskStatus]:
        """Wait for the next event; return the tasks that have ended by it. Raises TaskNotFound, BrokerError.

        ``again``: the tasks may have failed and been sent again before this wait began.
        """
        news = await watch.next()
        if isinstance(news, Exception):
            raise news
        if news is not None:
            if news.state == "failed" and again and await self._goes_on(news.id):
                return []
            return [news] if waiting.told(news) else []
        while True:
            try:
                return await self._check(waiting, patient=patient)
            except BrokerUnavailable:
                await asyncio.sleep(RETRY_S)

    async def _check(self, waiting: Waiting, *, patient: bool) -> list[TaskStatus]:
        """Return the tasks that have ended, by their states. Raises TaskNotFound, BrokerError."""
        ended: list[TaskStatus] = []
        try:
            for part in waiting.parts():
                ended += await self._run(waiting.check(part, patient=patient))
        except BaseException:  # a timeout, or Redis is away: another check follows
            waiting.untold(ended)
            raise
        return ended

    async def results(
        self, task_ids: Sequence[str], timeout_s: float | None = None, *, return_errors: bool = False
    ) -> list[Any]:
        """Wait for tasks and return their results in order.

        Raises the first error; with ``return_errors``, errors are in the list instead.
        """
        found = {status.id: status async for status in self.as_completed(task_ids, timeout_s)}
        ordered = [found[task_id] for task_id in task_ids]
        if return_errors:
            return [status.error or status.result for status in ordered]
        return [status.unwrap() for status in ordered]
