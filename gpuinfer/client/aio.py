# SPDX-License-Identifier: Apache-2.0
"""The asyncio client. All waits of a client share one subscription connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self, Unpack

from redis.exceptions import RedisError, ResponseError

from gpuinfer.client import core
from gpuinfer.client.core import (
    LOOK,
    Accepted,
    Call,
    Origin,
    Waiting,
)
from gpuinfer.client.driver import Driver, refuse_key
from gpuinfer.client.outgoing import Outgoing
from gpuinfer.client.pipe import Pipe
from gpuinfer.client.subscription import RETRY_S
from gpuinfer.client.waits import Waits, Watch
from gpuinfer.errors import (
    BrokerError,
    BrokerUnavailable,
    InputError,
    KeyQuota,
    RateLimited,
    TaskNotFound,
    WaitTimeout,
)
from gpuinfer.models.signature import Signature
from gpuinfer.queue import catalogue, dead, depth, heartbeats, history, keys, readiness, results, usage
from gpuinfer.queue import format as layout
from gpuinfer.queue import quota as quotas
from gpuinfer.queue.connection import connect_async, typed_errors
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.options import Options, documented
from gpuinfer.queue.position import spot_of
from gpuinfer.queue.quota import Quota
from gpuinfer.queue.resource import Place, to_resource
from gpuinfer.queue.results import TaskStatus
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import Settings


class _Unknown(Exception):
    """Raised where what a model takes must be asked for."""


def _retrieve(answer: asyncio.Future[Any]) -> None:
    """Take note of a failure that nobody waits for."""
    if not answer.cancelled():
        answer.exception()


class AsyncClient(Driver):
    """Talks to the queue from an event loop. Use it in the loop it was first used in.

    ``source`` is a broker URL, a Settings object, or None for this host's settings.
    """

    def __init__(self, source: Settings | str | None = None) -> None:
        super().__init__(source)
        self._redis = connect_async(self._settings.broker)
        options = self._redis.connection_pool.connection_kwargs
        self._pipe = Pipe(self._redis, options["socket_timeout"])
        self._submit = self._pipe.script("submit")
        self._cancel = self._pipe.script("cancel")
        self._history = self._pipe.script("history")
        self._forget = self._pipe.script("erase")
        self._tell = self._pipe.script("origin")
        self._was_known = self._pipe.script("known")
        self._revive = self._pipe.script("revive")
        self._account = self._pipe.script("account")
        self._outgoing = Outgoing(self._call, self._settings.queue)
        #: What callers were refused by their quotas.
        self.refusals = quotas.Refusals()
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

    # -- looking --------------------------------------------------------------------------

    async def fleet(self) -> catalogue.Fleet:
        """Return which models the fleet knows, who serves them, and what waits.

        Raises BrokerUnavailable.
        """
        with typed_errors(self._user):
            return await catalogue.aread(self._redis)

    async def takes(self, model: str, *, fresh: bool = True) -> Signature | None:
        """Return what a model takes, with an example where one is known; None where nobody has told.

        With ``fresh=False`` it may be what this client was told in the last half minute. Raises
        BrokerUnavailable.
        """
        if fresh or self._signatures.stale(model) or self._signatures.of(model) is None:
            await self._ask(model)
        return self._signatures.of(model)

    async def ping(self) -> None:
        """Raises BrokerUnavailable when Redis does not answer, UnusableRedis where it has another format."""
        with typed_errors(self._user):
            layout.check(await self._pipe.call("GET", keys.FORMAT_KEY))

    async def queues(self) -> depth.Depth:
        """Return what waits, what is in flight, and which queues are paused. Raises BrokerUnavailable."""
        with typed_errors(self._user):
            return await depth.alook(self._redis)

    async def workers(self) -> list[dict[str, Any]]:
        """Return what each worker's last heartbeat says. Raises BrokerUnavailable."""
        with typed_errors(self._user):
            return heartbeats.shown(*await heartbeats.aread(self._redis))

    async def capacity(self) -> readiness.Capacity:
        """Return which workers serve now, and which instances a live watcher may start.

        Raises BrokerUnavailable.
        """
        with typed_errors(self._user):
            return await readiness.aread(self._redis)

    async def claimed(self) -> int:
        """Return how many tasks were ever claimed from the queues. Raises BrokerUnavailable."""
        with typed_errors(self._user):
            counts: Any = await self._pipe.call("HGETALL", keys.CLAIMED)
        values = counts.values() if isinstance(counts, dict) else counts[1::2]  # by Redis's protocol
        return sum(map(int, values))

    async def task(self, task_id: str, *, only: str | None = None) -> dict[str, Any]:
        """Return a task as ``GET /tasks/{id}`` shows it: status, model, times, attempt, metrics, worker,
        result or error, metadata, and while it waits its position. ``only``: as for ``status``.

        Raises InputError, TaskNotFound (ResultGone where it has expired), UnreadableResult, BrokerError.
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
        """Return tasks that have ended, the newest first: of the last 10,000, and with ``status="failed"`` of
        up to 100,000 of a day. ``before`` is the last page's, or a time; ``only``: those of this caller, and
        nobody's in particular.

        Raises InputError, BrokerUnavailable.
        """
        search = history.Search(status=status, model=model, before=before, limit=limit, only=only)
        with typed_errors(self._user):
            while not search.done:
                search.take(await self._history([], search.args), time.time())
        return search.page

    async def usage(self, since_s: float = usage.USUAL_S) -> usage.Usage:
        """Return who has used how much, in the hours that the last ``since_s`` seconds touch.

        Raises BrokerUnavailable.
        """
        with typed_errors(self._user):
            return await usage.aread(self._redis, since_s)

    async def account(self, counts: list[Argument]) -> None:
        """Add what a process has counted (``tally.Tally.args``). Raises BrokerError."""
        with typed_errors(self._user):
            await self._account([], counts)

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
        """Submit many inputs, each as a task of its own, in few round trips; return their ids in order.

        Not all or nothing: when Redis fills up or goes away on the way, the error's ``accepted`` has the ids
        of those that it has confirmed.
        """
        refuse_key(options)
        await self._default_model(options)
        ready = await self._ready(list(inputs), many=False, options=options)
        tasks = self._build_many(ready, options, self._origin)
        accepted: list[str] = []
        calls = core.bulk(tasks, self._settings.queue)
        try:
            with typed_errors(self._user):
                if self._origin.to_tell():
                    await self._introduce()
                while some := core.trip(calls):
                    await self._send(some, accepted)
        except BrokerError as exc:
            exc.accepted = tuple(accepted)
            raise
        return accepted

    async def _introduce(self) -> None:
        """Let Redis know whose ids these are, so that a later request learns that a task has expired."""
        try:
            await self._tell([], [self._origin.prefix])
        except ResponseError:
            pass  # without the right to, nobody learns that
        except BaseException:
            self._origin.tell_again()
            raise

    async def _send(self, calls: Sequence[Call], accepted: list[str]) -> None:
        """Call the script in one round trip; note what was accepted. Raises the first error."""
        answers = await asyncio.gather(*(self._call(call) for call in calls), return_exceptions=True)
        for call, answer in zip(calls, answers, strict=True):
            if not isinstance(answer, BaseException):
                accepted += call.ids
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

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
        """Return a checked task, to be sent: its id is known, so that its end can be watched before.

        Inputs may be ``Json``. ``task_id`` is an id of the caller's own. ``caller``: whose task it is, by the
        name of a key; ``quota``: what that one may submit. Raises InputError, BrokerError.
        """
        if self._default.stale and options.get("model") is None:
            await self._default_model(options)
        try:  # mostly all that is asked is known
            inputs = self._ready_now(inputs, many=many, options=options)
        except (_Unknown, InputError):
            (inputs,) = await self._ready([inputs], many=many, options=options)
        return core.build(
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
        """Submit a task with this turn's others; return its id, or that of the one its key stands for.

        ``task.rate`` tells then how a caller with a quota stands. Raises InputError, PayloadTooLarge,
        UnknownModel, RateLimited, KeyQuota, BrokerError.
        """
        try:
            with typed_errors(self._user):
                if self._origin.to_tell():
                    await self._introduce()
                if not task.key:
                    task.rate = await self._outgoing.put(core.pack(task, self._settings.queue))
                    return task.id
                holder, task.rate = await self._call(core.one(task, self._settings.queue))
        except (RateLimited, KeyQuota) as exc:
            self.refusals.note(task.caller, exc)
            raise
        return holder

    async def weigh(self, weights: Mapping[str, float]) -> None:
        """Set the weights of callers that take turns (1 where there is none); those of others are dropped.

        Raises BrokerError.
        """
        with typed_errors(self._user):
            found = await self._pipe.call("HKEYS", keys.WEIGHTS)
            for command in quotas.weighing(weights, found):
                await self._pipe.call(*command)

    async def _call(self, call: Call) -> Accepted:
        """Send bodies, then the call of the script, in one packet; return its answer."""
        bodies = [self._pipe.call(*command) for command in call.commands()]
        for body in bodies:
            body.add_done_callback(_retrieve)
        try:
            return core.accepted(await self._submit(list(call.bodies), call.args))
        except RedisError as exc:
            found = core.answer_of(*await asyncio.gather(*bodies, return_exceptions=True), exc)
            raise found from None

    async def _default_model(self, options: Options) -> str | None:
        """Return the fleet's default model, for a caller that names none."""
        if options.get("model") is None and self._default.stale:
            with typed_errors(self._user):
                self._default.found(await self._pipe.call("GET", keys.DEFAULT_MODEL))
        return self._default.name

    def _ready_now(self, inputs: Any, *, many: bool, options: Options) -> Any:
        """Return one task's inputs as they are sent. Raises InputError, and _Unknown: Redis must be asked."""
        model = self._model_of(options)
        if model is not None and self._signatures.stale(model):
            raise _Unknown
        return self._signatures.ready(model, inputs, many=many)

    async def _ready(self, values: list[Any], *, many: bool, options: Options) -> list[Any]:
        """Return inputs as they are sent. Raises InputError for a file that cannot be read, and for what the
        model cannot take.
        """
        model = self._model_of(options)
        if model is not None and self._signatures.stale(model):
            await self._ask(model)
        try:
            return self._signatures.all_ready(model, values, many=many)
        except InputError:
            if model is None or not self._signatures.doubts(model):
                raise
        await self._ask(model)
        return self._signatures.all_ready(model, values, many=many)

    async def _ask(self, model: str) -> None:
        """Ask what a model takes. A user without the right to know is not told."""
        with typed_errors(self._user):
            try:
                found = await self._pipe.call("HGET", keys.SIGNATURES, model)
            except ResponseError:
                found = None
        self._signatures.found(model, found)

    async def cancel(self, task_id: str, *, only: str | None = None) -> bool:
        """Cancel a task that has not ended; return whether it was cancelled.

        ``only``: the caller whose task it must be; None: anybody's. Another's is as if it were unknown.

        What runs on the device just now runs on; nothing else of the task does, and its result is dropped. An
        id that nothing is known of may be a plain Celery producer's task, which waits: it is cancelled too,
        but refused with QueueFull by a full Redis. Raises InputError, TaskNotFound where it is another's,
        BrokerError.
        """
        names, args = core.cancel_call(task_id, self._origin, self._settings.queue, only)
        with typed_errors(self._user):
            answer = int(await self._cancel(names, args))
        if answer < 0:
            raise await self._gone(task_id, only)
        return answer > 0

    async def retry(self, task_id: str, *, only: str | None = None, quota: Quota | None = None) -> None:
        """Send a task that failed, or is a dead letter, to its queue again, under its id. ``only``: as for
        ``cancel``; ``quota``: what that one may submit.

        Raises WrongState for a task that is neither, or whose inputs are not kept any more; TaskNotFound,
        InputError where it can never run, RateLimited, KeyQuota, BrokerError.
        """
        core.result_key(task_id)
        text = "" if quota is None else quota.text
        try:
            with typed_errors(self._user):
                letter = await self._pipe.call("HGET", keys.DEAD, task_id)
                if letter is not None:
                    if not dead.owned(letter, only):
                        raise await self._gone(task_id, only)
                    list_key, args = dead.revival(task_id, letter)
                    dead.revived(task_id, list_key, await self._revive([list_key], [*args, "", text]))
                    return
                failed = await self._pipe.call("HGET", keys.FAILED, task_id)
                if failed is not None:
                    if not dead.failed_owned(failed, only):
                        raise await self._gone(task_id, only)
                    list_key, args = dead.failed_revival(task_id, failed)
                    answer = await self._revive([list_key], [*args, text])
                    dead.revived(task_id, list_key, answer, failed=True)
                    return
        except (RateLimited, KeyQuota) as exc:
            self.refusals.note(only or "", exc)
            raise
        raise core.no_retry(await self.status(task_id, only=only))

    async def forget(self, task_id: str, *, only: str | None = None) -> None:
        """Delete a task that has ended: its result, and what is kept to send it again. ``only``: as for
        ``cancel``.

        Raises WrongState for one that has not, TaskNotFound, InputError, BrokerError.
        """
        key = core.result_key(task_id)
        with typed_errors(self._user):
            answer = int(await self._forget([key], [task_id, *core.only_args(only)]))
        if answer == 0:
            raise await self._gone(task_id, only)
        if answer < 0:
            raise core.refused_erasure(answer, task_id)

    # -- waiting --------------------------------------------------------------------------

    async def status(self, task_id: str, *, only: str | None = None) -> TaskStatus:
        """Return a task's state now. ``only``: of this caller's tasks, or nobody's in particular.

        Raises InputError, TaskNotFound, UnreadableResult.
        """
        key = core.result_key(task_id)
        try:
            with typed_errors(self._user):
                meta = await self._pipe.call("GET", key)
        except BrokerError as exc:
            raise core.of_task(task_id, exc) from exc
        if meta is None:
            raise await self._gone(task_id, only)
        status = results.parse(task_id, meta)
        if not core.owned(status, only):
            raise await self._gone(task_id, only)
        return status

    async def _gone(self, task_id: str, only: str | None = None) -> TaskNotFound:
        """Return the error for an id that Redis knows nothing of: it may have known its task once.

        So it is for a task that is not ``only``'s.
        """
        with typed_errors(self._user):
            known = self._origin.made(task_id) or await self._known([task_id], only) == [1]
        return core.gone(task_id) if known else core.not_found(task_id)

    async def _known(self, task_ids: Sequence[str], only: str | None = None) -> list[int]:
        """Return 1 for each id that was submitted once. A user without the right to know is not told."""
        with suppress(ResponseError):
            return list(await self._was_known([], core.known_args(task_ids, only)))
        return []

    async def place(self, status: TaskStatus) -> Place | None:
        """Return where a task stands that waits: an estimate. None where that cannot be told.

        Raises BrokerError.
        """
        spot = spot_of(status)
        if spot is None:
            return None
        with typed_errors(self._user):
            length, claimed = await asyncio.gather(
                self._pipe.call("LLEN", spot.list), self._pipe.call("HGET", keys.CLAIMED, spot.counter)
            )
        return spot.place(int(length), int(claimed or 0), time.time())

    async def wait(
        self, task_id: str, timeout_s: float | None = None, *, only: str | None = None
    ) -> TaskStatus:
        """Wait until a task has ended, at most ``timeout_s``; return its state then. ``only``: as for
        ``status``.

        An id that nothing is known of may be a plain Celery producer's task, which waits: with a timeout it
        is waited for until then. Raises InputError, TaskNotFound, BrokerError.
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
        """Return what hears of a task's end from now on, for ``ended``. Raises InputError."""
        core.result_key(task_id)
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
        """Wait for a task's end, however long.

        ``patient``: an id that nothing is known of is waited for, too. ``submitted``: it was watched before
        it was sent, so that there is no need to look whether it has ended. ``only``: as for ``status``;
        ``raw``: as for ``results.parse``. Raises TaskNotFound, BrokerError.
        """
        waiting = Waiting((task_id,), self._origin, only, raw=raw)
        ended = [] if submitted else await self._look(waiting, patient=patient)
        while not ended:
            ended = await self._next(watch, waiting, patient=patient, again=not submitted)
        return ended[0]

    async def result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """Wait for a task, as ``wait`` does, and return its result; raise its error.

        Raises TaskNotFound, WaitTimeout.
        """
        status = await self.wait(task_id, timeout_s)
        if not status.final:
            raise WaitTimeout(f"task {task_id} has not ended in {timeout_s:g} s; it goes on")
        return status.unwrap()

    async def as_completed(
        self, task_ids: Iterable[str], timeout_s: float | None = None
    ) -> AsyncIterator[TaskStatus]:
        """Yield the final status of each task as it ends. Raises TaskNotFound, WaitTimeout.

        With a timeout, an id that nothing is known of is waited for, as ``wait`` does. Goes on through a
        restart of Redis; BrokerUnavailable is raised where it is away at the beginning.
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
                        else:  # a Redis that is away now is told, later it is waited for
                            began = True
                            ended = await self._look(waiting, patient=patient)
                except TimeoutError:
                    ended = await self._look(waiting, patient=False)
                    if waiting and not ended:
                        raise WaitTimeout(
                            f"{len(waiting)} tasks have not ended in time; they go on"
                        ) from None
                for status in ended:
                    yield status

    async def _goes_on(self, task_id: str) -> bool:
        """Tell whether a task of which a failure was told has been sent again since."""
        with suppress(RedisError):
            return core.goes_on(task_id, await self._pipe.call("GET", keys.result(task_id)))
        return False

    async def _next(
        self, watch: Watch, waiting: Waiting, *, patient: bool, again: bool = True
    ) -> list[TaskStatus]:
        """Wait for the next news; return which tasks have ended by it. Raises TaskNotFound, BrokerError.

        ``again``: they may have failed, and been sent again, before this wait began.
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
                return await self._look(waiting, patient=patient)
            except BrokerUnavailable:
                await asyncio.sleep(RETRY_S)

    async def _look(self, waiting: Waiting, *, patient: bool) -> list[TaskStatus]:
        """Return which tasks have ended. Raises TaskNotFound, BrokerError."""
        ids, ended = waiting.ids, []
        for start in range(0, len(ids), LOOK):
            some = ids[start : start + LOOK]
            with typed_errors(self._user):
                metas = waiting.visible(some, await self._pipe.call("MGET", *map(keys.result, some)))
                if missing := waiting.missing(some, metas):
                    waiting.expired(missing, await self._known(missing, waiting.only))
            ended += waiting.looked(some, metas, patient=patient)
        return ended

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
