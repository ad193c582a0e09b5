# SPDX-License-Identifier: Apache-2.0
"""The asyncio client. All waits of a client share one subscription connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Self, Unpack

from gpuinfer.client import core
from gpuinfer.client.core import Call, DefaultModel, Options, Origin
from gpuinfer.client.sync import not_found, settings_for
from gpuinfer.client.waits import RETRY_S, Waits
from gpuinfer.errors import BrokerError, BrokerUnavailable, InputError, WaitTimeout
from gpuinfer.queue import catalogue, keys, results
from gpuinfer.queue import format as layout
from gpuinfer.queue.connection import connect_async, typed_errors, user_of
from gpuinfer.queue.results import TaskStatus
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import Settings


def _watch_cancellation() -> Callable[[], None]:
    """Return a function that raises a cancellation which came after this call and was lost.

    Before Python 3.12 ``asyncio.wait_for``, which redis-py uses, swallows one that comes as it ends.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0

    def heed() -> None:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError

    return heed


class AsyncClient:
    """Talks to the queue from an event loop. Use it in the loop it was first used in.

    ``source`` is a broker URL, a Settings object, or None for this host's settings.
    """

    def __init__(self, source: Settings | str | None = None) -> None:
        self._settings = settings_for(source)
        self._redis = connect_async(self._settings.broker)
        self._user = user_of(self._settings.broker)
        self._submit = bind(self._redis, "submit")
        self._cancel = bind(self._redis, "cancel")
        self._origin = Origin()
        self._waits = Waits(self._redis, self._origin)
        self._default = DefaultModel()

    async def aclose(self) -> None:
        """Stop listening and close all connections."""
        await self._waits.aclose()
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- looking --------------------------------------------------------------------------

    @property
    def default_model(self) -> str | None:
        """The model of requests that name none, as last heard; None: not known."""
        return self._default.name

    async def fleet(self) -> catalogue.Fleet:
        """Return which models the fleet knows, who serves them, and what waits.

        Raises BrokerUnavailable.
        """
        with typed_errors(self._user):
            return await catalogue.aread(self._redis)

    async def ping(self) -> None:
        """Raises BrokerUnavailable when Redis does not answer, UnusableRedis where it has another format."""
        with typed_errors(self._user):
            layout.check(await self._redis.get(keys.FORMAT_KEY))

    # -- submitting -----------------------------------------------------------------------

    async def submit(self, inputs: Any, **options: Unpack[Options]) -> str:
        """Submit one input and return its task id.

        Raises InputError, PayloadTooLarge, UnknownModel, BrokerUnavailable.
        """
        return await self._one(inputs, many=False, options=options)

    async def submit_batch(self, inputs: Any, **options: Unpack[Options]) -> str:
        """Submit a list, tuple or array of inputs as one job (``gpuinfer.batch_predict``); return its id."""
        return await self._one(inputs, many=True, options=options)

    async def submit_many(self, inputs: Iterable[Any], **options: Unpack[Options]) -> list[str]:
        """Submit many inputs, each as a task of its own, in few round trips; return their ids in order.

        Not all or nothing: when Redis fills up or goes away on the way, the error's ``accepted`` has the ids
        of those that it has confirmed.
        """
        if options.pop("idempotency_key", None) is not None:
            raise InputError("stands for one task; use submit or submit_batch", "idempotency_key")
        default = await self._default_model(options)
        tasks = [
            core.build(value, many=False, origin=self._origin, default_model=default, **options)
            for value in inputs
        ]
        accepted: list[str] = []
        try:
            with typed_errors(self._user):
                for call in core.bulk(tasks, self._settings.queue):
                    await self._call(call)
                    accepted += call.ids
        except BrokerError as exc:
            exc.accepted = tuple(accepted)
            raise
        return accepted

    async def _one(self, inputs: Any, *, many: bool, options: Options) -> str:
        key = options.get("idempotency_key")
        default = await self._default_model(options)
        task = core.build(inputs, many=many, origin=self._origin, default_model=default, **options)
        call = core.one(task, self._settings.queue, key)
        with typed_errors(self._user):
            holder = await self._call(call)
        return holder.decode()

    async def _call(self, call: Call) -> bytes:
        """Send bodies, then the call of the script, in one packet; return its answer."""
        if not call.bodies:
            return await self._submit(args=call.args)  # type: ignore[no-any-return]
        async with self._redis.pipeline(transaction=False) as pipe:
            for command in call.commands():
                pipe.execute_command(*command)
            await self._submit(keys=list(call.bodies), args=call.args, client=pipe)
            *_, answer = await pipe.execute(raise_on_error=False)
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    async def _default_model(self, options: Options) -> str | None:
        """Return the fleet's default model, for a caller that names none."""
        if options.get("model") is None and self._default.stale:
            with typed_errors(self._user):
                found: bytes | None = await self._redis.get(keys.DEFAULT_MODEL)  # type: ignore[assignment]
            self._default.found(found)
        return self._default.name

    async def cancel(self, task_id: str) -> bool:
        """Cancel a task that has not ended; return whether it was cancelled.

        What runs on the device just now runs on; nothing else of the task does, and its result is dropped. An
        id that nothing is known of may be a plain Celery producer's task, which waits: it is cancelled too.
        """
        args = core.cancellation(task_id, self._origin, self._settings.queue.result_ttl_s)
        with typed_errors(self._user):
            return bool(await self._cancel(keys=[keys.result(task_id)], args=args))

    # -- waiting --------------------------------------------------------------------------

    async def status(self, task_id: str) -> TaskStatus:
        """Return a task's state now. Raises TaskNotFound."""
        status = await self._known(task_id)
        if status is None:
            raise not_found(task_id)
        return status

    async def _known(self, task_id: str) -> TaskStatus | None:
        """Return a task's state now; None: nothing is known of it."""
        with typed_errors(self._user):
            meta = await self._redis.get(keys.result(task_id))
        return None if meta is None else results.parse(task_id, meta)

    async def wait(self, task_id: str, timeout_s: float | None = None) -> TaskStatus:
        """Wait until a task has ended, at most ``timeout_s``; return its state then.

        An id that nothing is known of may be a plain Celery producer's task, which waits: with a timeout it
        is waited for until then. Raises TaskNotFound, BrokerUnavailable.
        """
        heed_cancellation = _watch_cancellation()
        patient = timeout_s is not None and timeout_s > 0 and not self._origin.made(task_id)
        status = await self._known(task_id)
        if status is None and not patient:
            raise not_found(task_id)
        if status is not None and (status.final or (timeout_s is not None and timeout_s <= 0)):
            return status
        try:
            async with asyncio.timeout(timeout_s), self._waits.watch(task_id) as mailbox:
                while True:
                    heed_cancellation()
                    news = await mailbox.get()
                    if news is not None:
                        return news
                    before, status = status, await self._look(task_id)
                    if status is None and (before is not None or not patient):
                        raise not_found(task_id)
                    if status is not None and status.final:
                        return status
        except TimeoutError:
            return await self.status(task_id)

    async def _look(self, task_id: str) -> TaskStatus | None:
        """Return a task's state, if any is known, once Redis answers.

        A subscription that stands is not confirmed again.
        """
        while True:
            try:
                return await self._known(task_id)
            except BrokerUnavailable:
                await asyncio.sleep(RETRY_S)

    async def result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """Wait for a task and return its result; raise its error. Raises TaskNotFound, WaitTimeout."""
        status = await self.wait(task_id, timeout_s)
        if not status.final:
            raise WaitTimeout(f"task {task_id} has not ended in {timeout_s:g} s; it goes on")
        return status.unwrap()

    async def as_completed(
        self, task_ids: Iterable[str], timeout_s: float | None = None
    ) -> AsyncIterator[TaskStatus]:
        """Yield the final status of each task as it ends. Raises TaskNotFound, WaitTimeout."""
        waits = [asyncio.ensure_future(self.wait(task_id, timeout_s)) for task_id in dict.fromkeys(task_ids)]
        try:
            for done in asyncio.as_completed(waits):
                status = await done
                if not status.final:
                    raise WaitTimeout("not all tasks have ended in time; they go on")
                yield status
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def results(
        self, task_ids: Sequence[str], timeout_s: float | None = None, *, return_errors: bool = False
    ) -> list[Any]:
        """Wait for tasks and return their results in order.

        The first error is raised, or with ``return_errors`` stands in its task's place.
        """
        found = {status.id: status async for status in self.as_completed(task_ids, timeout_s)}
        ordered = [found[task_id] for task_id in task_ids]
        if return_errors:
            return [status.error or status.result for status in ordered]
        return [status.unwrap() for status in ordered]
