# SPDX-License-Identifier: Apache-2.0
"""The batcher: takes what a claim delivered, keeps the inference thread fed, settles what it returns.

Runs on the main thread, inside Celery's event loop::

    claim ─► receive ─► buffer ─► pump: begin, submit ─► (inference thread) ─► collect: settle ─► claim

A batch never waits for company when the device is idle; while one runs, the next gathers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import redis

from gpuinfer.errors import (
    DeviceError,
    GpuinferError,
    ResultTooLarge,
    SoftTimeLimitExceeded,
    TakenBack,
    TaskExpired,
    TaskRevoked,
    UnusableRedis,
    WorkerRunning,
)
from gpuinfer.log import get_logger
from gpuinfer.models.manifest import Manifest
from gpuinfer.queue.claims import Claimed, Final, State, Want, Wants
from gpuinfer.queue.router import Router
from gpuinfer.queue.sink import TaskChannel
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings
from gpuinfer.worker import task_log
from gpuinfer.worker.accounting import Accounts
from gpuinfer.worker.buffer import AGED, Batch, Buffer
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.engine import Done, Engine
from gpuinfer.worker.intake import Intake
from gpuinfer.worker.outbox import Outbox
from gpuinfer.worker.pace import LONG_BATCH_S, Pace
from gpuinfer.worker.passes import RunAlone
from gpuinfer.worker.task import Task, conclude
from gpuinfer.worker.task_log import TaskLog

log = get_logger(__name__)

#: Bytes of arguments, as text and unpacked, that a worker holds at most, beside the oldest of its batches.
BUFFER_BYTES = 64 * 1024 * 1024
#: Seconds the event loop may stand still for a batch that nothing waits behind.
PATIENCE_S = 0.002
#: Seconds between two looks for tasks that wait in the default model's lists and are for another one.
ROUTE_EVERY_S = 1.0
#: Seconds between two looks for dead letters that have grown too old.
TRIM_EVERY_S = 60.0
#: Seconds between two looks whether what runs was cancelled.
CANCELLED_LOOK_S = 0.5
#: Seconds between two looks whether what waits for its time has expired.
LATER_LOOK_S = 1.0


class Batcher:
    """The channel's sink. One a worker process; it outlives reconnections."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        manifests: Mapping[str, Manifest],
        settings: Settings,
        device: str,
        celery_state: CeleryState,
        on_fatal: Callable[[GpuinferError], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.engine = engine
        self.device = device
        #: The manifests of the models served, by name.
        self.models = manifests
        self._settings = settings
        self._celery = celery_state
        self._on_fatal = on_fatal
        self._clock = clock
        self._wall = wall
        self._buffer = Buffer(engine.limit)
        #: How many tasks one claim takes at most: fewer while some of what came was handed back.
        self._stride = self._longest
        self._outbox = Outbox(store)
        self._lines = TaskLog(settings.log, clock)
        self.accounts = Accounts(store)
        self._intake = Intake(store, self._outbox, celery_state, manifests, settings, self._lines)
        self._closed = self._crashed = False
        #: The batch that has ended, while what is more urgent than the next is looked for.
        self._finishing: Batch | None = None
        self._looked_at = self._routed_at = self._asked_at = clock()
        self._trimmed_at = -math.inf
        #: Model -> seconds that its batches take, a moving average.
        self._batch_s: dict[str, float] = {}
        #: Tasks that a reaper has put back while they ran here.
        self._taken_back: set[int] = set()
        #: Those among them that go on where they are claimed next, as long as their batch is being finished.
        self._dropped: set[int] = set()
        #: Whether what is ahead of the device goes first because its list was passed over for too long.
        self._ahead_aged = False
        self._pace = Pace(engine, self._batch_s)
        self._router = Router(store, settings.queue)
        self._debug = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)
        self.channel: TaskChannel | None = None

    @property
    def _longest(self) -> int:
        """The most tasks that fill a batch."""
        return max(self.engine.limit(name) for name in self.models)

    @property
    def state(self) -> State:
        """Return what runs here: nothing and nothing waits, nothing just now, or a batch."""
        if self.engine.current is not None:
            return "busy"
        held = (
            self._finishing is not None
            or self._buffer.ready
            or self._intake.waiting
            or self._outbox.unsettled
            or self.engine.on_account
        )
        return "free" if held else "idle"

    @property
    def done(self) -> int:
        """How many tasks have ended in this process."""
        return self._celery.done

    @property
    def closed(self) -> bool:
        """True when it has been drained."""
        return self._closed

    def attach(self, channel: TaskChannel, dispatcher: Any) -> None:
        """Serve a new connection."""
        self.channel, self._celery.dispatcher = channel, dispatcher

    def show(self) -> None:
        """Let Celery see what is held now."""
        self._celery.show()

    def detach(self) -> None:
        """Go on without a connection: what runs is settled when there is one again."""
        self.channel = self._celery.dispatcher = None
        self.store.mark_uncertain()  # what a claim takes whose answer is never read

    # -- the channel's side ---------------------------------------------------------------

    def wants(self) -> Wants:
        """Return what to claim: up to a batch of any model; to what waits here, what fills or overtakes it.

        What a worker holds no other one can run. So nothing is claimed while a long batch runs, while what
        was claimed waits to be read, nor while a probe tells whether this GPU still works.
        """
        if self._closed or self.engine.probing or self._intake.waiting:
            return {}
        long = self._long(self.engine.current)
        if long and not self._pace.due():
            return {}
        self._buffer.wake(self._clock())
        affordable = int(self._room_bytes / self._intake.task_bytes)
        # Behind a long batch no more is held than the one that is being prepared.
        ahead = self.engine.ahead if long else None
        batch = ahead or self._buffer.next_batch()
        wants: dict[str, Want] = {}
        for model, manifest in self.models.items():
            count = min(self._stride, self.engine.limit(model), max(1, affordable))
            want = Want(count, least=manifest.min_batch_size)
            if batch is not None:
                rank = batch.tasks[0].place[0]
                if model == batch.model:
                    spare = min(self._buffer.spare(model) - (ahead.size if ahead else 0), affordable)
                    want = Want(min(count, spare), least=1)
                    rank = batch.tasks[-1].place[0]
                if model != batch.model or want.count <= 0:
                    want = Want(count if rank > 0 else 0, better_than=rank)
            if want.count > 0:
                wants[model] = want
        return wants

    @property
    def _room_bytes(self) -> int:
        """How many bytes of arguments may come yet: those of batches behind the oldest count."""
        behind = (task.size for batch in self.engine.batches[1:] for task in batch.tasks)
        return BUFFER_BYTES - self._buffer.size - sum(behind)

    def _long(self, batch: Batch | None) -> bool:
        """Tell whether a batch takes so long that nothing should be held behind it."""
        if batch is None:
            return False
        usual = self._batch_s.get(batch.model)
        return usual is None or usual > LONG_BATCH_S or self.engine.running_s > LONG_BATCH_S

    def held(self) -> set[int]:
        """Return the seqs of everything claimed and not settled."""
        tasks = chain(self._buffer, *(batch.tasks for batch in self._on_device()))
        unread = {claimed.seq for claimed in self._intake.waiting}
        return ({task.seq for task in tasks} - self._dropped) | unread | self._outbox.held()

    def _on_device(self) -> list[Batch]:
        """Return the batches that run, and the one whose ends are not written yet."""
        finishing = () if self._finishing is None else (self._finishing,)
        return [*self.engine.batches, *finishing]

    def end(self, error: GpuinferError) -> None:
        """End the process at once, for a reason that is not its tasks'."""
        self._on_fatal(error)

    def fenced(self, error: WorkerRunning | TakenBack | UnusableRedis) -> None:
        """End the process when another one claims under this name, or Redis has another format; begin a
        new epoch after a reaper."""
        if not isinstance(error, TakenBack):
            self._on_fatal(error)
            return
        self._withdraw()
        tasks = self._buffer.clear()
        self._intake.waiting = []
        for task in tasks:
            self._celery.finished(task, None)
        running = [task for batch in self._on_device() for task in batch.tasks]
        self._taken_back = {task.seq for task in running}
        task_log.taken_back([*tasks, *running], error)
        try:
            self.store.rejoin()
        except (redis.RedisError, OSError, TakenBack) as exc:
            self._outbox.trouble("begin an epoch", exc)  # and again at the next claim
        except (WorkerRunning, UnusableRedis) as exc:
            self._on_fatal(exc)

    def receive(self, channel: TaskChannel, claims: Sequence[Claimed]) -> None:
        """Read claimed tasks into the buffer; what can never run ends here."""
        self.channel = channel
        self._outbox.claimed(claims)
        self._read(claims)
        if self._finishing is not None:
            return
        self.pump()
        self._settle([])  # what is on record may not have begun
        if len(claims) < min(self._stride, self.engine.limit(claims[0].model or next(iter(self.models)))):
            self._wait_briefly()
        else:
            self.engine.wake()  # there is more, perhaps: claim the next batch while this one runs

    def _read(self, claims: Sequence[Claimed] = ()) -> None:
        """Read claimed tasks, and those that waited to be read, into the buffer."""
        if self.channel is None:  # what waits does so until there is one
            return
        came = len(claims) + len(self._intake.waiting)
        room = self._room_bytes
        tasks, finals, unread = self._intake.read(self.channel, claims, self.engine.on_account, room)
        self._buffer.add_all(tasks)
        if finals:
            self._settle(finals)
        self._hand_back(came, unread)

    def _hand_back(self, came: int, unread: Sequence[Claimed]) -> None:
        """Put back what is beyond the batches that come next; claim less from now on."""
        tasks = self._buffer.surplus(self._room_bytes + self._buffer.size)
        if not tasks and not unread:
            if came >= self._stride:
                self._stride = min(self._longest, 2 * self._stride)
            return
        self._stride = max(1, came - len(tasks) - len(unread))
        self._put_back(tasks, unread)

    def _put_back(self, tasks: Sequence[Task], unread: Sequence[Claimed]) -> None:
        """Put tasks of the buffer back for other workers, and those that were not read.

        Not those that a thread still prepares: a death in there must be on their account.
        """
        strays = self._strays()
        tasks = [task for task in tasks if task not in strays]
        self._buffer.remove(tasks)
        for task in tasks:
            self._celery.finished(task, None)
        self._outbox.release([*tasks, *unread])
        task_log.handed_back(tasks, len(unread))

    def _strays(self) -> set[Task]:
        return {task for batch in self.engine.pipeline.strays() for task in batch.tasks}

    # -- feeding --------------------------------------------------------------------------

    def pump(self) -> None:
        """Start the next batch when the inference thread is idle, or is handed it to be prepared."""
        while not self.engine.probing and not self._closed:
            if self.engine.current is not None and not self._room_ahead():
                return
            if self._intake.waiting:
                self._read()
            self._buffer.wake(self._clock())
            self._drop_stale(self._buffer.ready)
            batch = self._buffer.next_batch()
            if batch is None or not self._may_start(batch) or not self._start(batch):
                return

    def _room_ahead(self) -> bool:
        """Tell whether a batch may be handed over behind the one that runs; make room for a better one.

        The batch that is ahead goes back to the buffer where something more urgent has come, or where it can
        grow: what is prepared of it is not lost.
        """
        ahead, first = self.engine.ahead, next(iter(self._buffer.ready), None)
        if first is None or self._suspect(self.engine.batches):
            return False
        if ahead is None:
            return self.engine.has_room
        if self._ahead_aged:  # it goes first, once
            return False
        urgent = first.place < ahead.tasks[0].place
        grows = first.model == ahead.model and ahead.size < self.engine.limit(ahead.model)
        grows = grows and first.kind == ahead.tasks[0].kind and not (first.alone or ahead.tasks[0].alone)
        return (urgent or grows) and self._withdraw()

    def _may_start(self, batch: Batch) -> bool:
        """Tell whether a batch may be handed over now. One with a death on its account runs by itself."""
        if self._suspect([batch]):
            return not self.engine.on_account
        return self.engine.takes(batch)

    @staticmethod
    def _suspect(batches: Iterable[Batch]) -> bool:
        return any(task.envelope.deaths for batch in batches for task in batch.tasks)

    def _withdraw(self) -> bool:
        """Put the batch that is ahead back into the buffer; False where the device has begun it."""
        batch = self.engine.withdraw()
        if batch is None:
            return False
        unbegun = [
            task for task in batch.tasks if not (task.outcomes or task.retries or task.ran_s or task.alone)
        ]
        for task in unbegun:
            task.time_start = None
        self._buffer.add_all(batch.tasks)
        if self._debug:
            task_log.batch_withdrawn(batch, unbegun)
        return True

    def _start(self, batch: Batch) -> bool:
        """Begin a batch. Returns False when Redis is away: the batch stays in the buffer."""
        ended = self._outbox.begin(batch, self.engine.on_account)
        if ended is None:
            return False
        if ended:  # cancelled, or finished by an earlier delivery
            tasks = [batch.tasks[i] for i in sorted(ended)]
            self._buffer.remove(tasks)
            for task in tasks:
                # One that comes again may have been finished by its earlier delivery.
                cancelled = task.begun or not task.redelivered
                self._celery.finished(task, TaskRevoked("it was cancelled") if cancelled else None)
                self._lines.task_skipped(task)
            self._lines.tell()
            self._settle([self._outbox.skipped(task) for task in tasks])
            return True
        if self.engine.current is not None and not self.engine.takes(batch):
            return False  # what ran has ended meanwhile
        tasks = batch.tasks
        self._ahead_aged = tasks[0].place[0] == AGED
        self._buffer.remove(tasks)
        self._buffer.end_ageing(tasks)
        now = self._wall()
        for task in tasks:
            if task.time_start is None:
                task.time_start = now
                self._celery.started(task)
        self.engine.submit(batch)
        self._pace.watch()
        if self._debug:
            task_log.batch_begun(batch)
        return True

    def _drop_stale(self, tasks: Iterable[Task]) -> None:
        """End what has expired or was revoked before it costs device time."""
        now, finals, dropped = self._wall(), [], []
        for task in tasks:
            error: GpuinferError | None = None
            if task.expires_at is not None and task.expires_at <= now and not task.begun:
                error = TaskExpired("its deadline passed before a worker could begin it")
            elif task.ran_s >= task.total_s:
                error = task.out_of_time()
            elif not task.begun and self._celery.revoked(task.id):
                error = TaskRevoked("it was revoked before a worker began it")
            if error is not None:
                dropped.append(task)
                finals.append(self._outbox.final(task.claimed, error, task.envelope, task))
                self._celery.finished(task, error)
                self._lines.task_dropped(task, error)
        if dropped:
            self._lines.tell()
            self._buffer.remove(dropped)
            self._settle(finals)

    # -- collecting -----------------------------------------------------------------------

    def collect(self) -> None:
        """Take what the inference thread has finished, start the next batch, then settle."""
        while not self.engine.done.empty():
            self._finish(self.engine.done.get())
        self._pace.watch()
        if self.channel is not None:  # there is no room once it is closed
            self.channel.again()

    def _wait_briefly(self) -> None:
        """Wait a moment for a batch when nothing else is held: the event loop's way round takes time, too."""
        if self.engine.current is None or self._buffer.ready:
            return
        done = self.engine.wait(PATIENCE_S)
        if done is not None:
            self._finish(done)
            if self.channel is not None and self.channel.silent:
                self.engine.wake()  # to look again

    def _finish(self, done: Done) -> None:
        """Start the next batch, then write this one's ends. What goes wrong here ends the process: its
        tasks come back, and a death is on the account of what ran."""
        self.engine.collected(done)
        took = done.seconds - done.waited_s
        usual = self._batch_s.get(done.batch.model, took)
        self._batch_s[done.batch.model] = usual + (took - usual) / 4
        self.accounts.ran(done.batch, took)
        self._pace.watch()
        if done.fatal is not None:
            task_log.batch_lost(done)
            self._on_fatal(done.fatal)
            return
        if any(task.envelope.deaths for task in done.batch.tasks):
            self._outbox.note_reading(self.engine.on_account)  # the next death is not its own doing any more
        try:
            if done.complete:  # before the results are written: the device need not wait for that
                self._overtake(done)
                self.pump()
            finals = self._outcomes(done)
            if not done.complete:  # what comes back is served before what is claimed now, or overtaken by it
                self._overtake(done)
            self._dropped -= {task.seq for task in done.batch.tasks}
            self.pump()
            self._settle(finals)
        except Exception as exc:
            self._lines.tell()
            log.exception("batch_unfinished", task_ids=[task.id for task in done.batch.tasks])
            self._crashed = True
            reason = f"a batch could not be finished: {type(exc).__name__}: {exc}"
            self._on_fatal(GpuinferError(reason))
        else:
            self._lines.batch_done(done, self.device)

    def _overtake(self, done: Done) -> None:
        """After a long batch, behind which nothing was claimed, claim the next before the ends are written.

        Also when a batch waits here: nobody tells of what is more urgent. The timer looks for what plain
        producers have sent only when something may be claimed, and in a row of long batches that is now.
        """
        if done.seconds < LONG_BATCH_S or self.channel is None or self._closed:
            return
        self._finishing = done.batch
        try:
            self.channel.claim(look=True)
        except (redis.RedisError, OSError):
            pass  # the event loop finds out, and connects again
        finally:
            self._finishing = None

    def _outcomes(self, done: Done) -> list[Final]:
        """Distribute a batch's outcomes over its tasks; return the ends of those that are complete."""
        finals, position = [], 0
        shared, size, now = done.batch.shared, done.batch.size, self._wall()
        rerun = RunAlone in set(map(type, done.outcomes))
        for part in done.batch.parts:
            task, count = part.task, part.stop - part.start
            mine = done.outcomes[position : position + count]
            position += count
            again = rerun and any(isinstance(outcome, RunAlone) for outcome in mine)
            if not (again and shared):  # else it was perhaps another's time
                task.ran_s += done.seconds
            task.batch_size = max(task.batch_size, size)
            final = self._advance(task, mine, None if shared else count, again=again)
            if final is None and task.seq in self._taken_back:  # the rest of it runs where it is claimed next
                self._buffer.remove([task])
                self._celery.finished(task, None)
                self._dropped.add(task.seq)
                self.store.mark_uncertain()  # a reaper that was cut off has not put it back
            if final is not None:
                finals.append(final)
                self.accounts.ended(task, now)
        self._taken_back -= {task.seq for task in done.batch.tasks}
        return finals

    def _advance(self, task: Task, outcomes: list[Any], alone: int | None, *, again: bool) -> Final | None:
        """Add a task's outcomes. Returns its end, or None when it goes back to the buffer.

        ``alone`` is the size of a batch that it had to itself; ``again``: the batch was too slow as a whole.
        """
        if task.ended:
            self._celery.finished(task, TaskRevoked("it was cancelled"))
            return self._outbox.skipped(task)
        if again:
            task.alone = True
            task.slice_limit = max(1, alone // 2) if alone else None
            self._buffer.add(task)
            return None
        passing = None
        for outcome in outcomes:
            if isinstance(outcome, GpuinferError) and outcome.transient:
                passing = outcome
                break
        if passing is not None and task.retries < self._settings.queue.max_retries:
            pause = self._settings.queue.retry_backoff_s * 2**task.retries
            task.retries += 1
            task.not_before = self._clock() + pause
            self._buffer.add(task)
            self._lines.task_retried(task, pause, passing)
            return None
        task.outcomes += outcomes
        if task.left:
            self._buffer.add(task)
            return None
        end = conclude(task, self.device)
        if isinstance(end, SoftTimeLimitExceeded) and task.ran_s >= task.total_s:
            end = task.out_of_time()
        try:
            final = self._outbox.final(task.claimed, end, task.envelope, task)
        except ResultTooLarge as exc:
            end, final = exc, self._outbox.final(task.claimed, exc, task.envelope, task)
        error = end if isinstance(end, GpuinferError) else None
        self._celery.finished(task, error, end)
        if error is not None:
            self._lines.task_failed(task, error)
        return final

    def _settle(self, finals: list[Final]) -> None:
        """Write final states, and that nothing runs when that is so."""
        idle = self.engine.current is None and not self._crashed
        self._outbox.settle(finals, idle=idle and not self.engine.pipeline.strays())

    # -- from start to end ----------------------------------------------------------------

    def tick(self) -> None:
        """Look after what waits for time, for Redis or for a probe. Called a few times a second."""
        if self.engine.failed is not None:
            if isinstance(self.engine.failed, DeviceError):
                task_log.device_lost(self.engine.failed, self.device)
            self._on_fatal(self.engine.failed)
            return
        self._settle([])
        self._flush()
        self._lines.tick(self.device)
        if self.engine.stalled and (len(self._buffer) or self._intake.waiting):
            unread, self._intake.waiting = self._intake.waiting, []
            self._put_back(list(self._buffer), unread)
        if not self.engine.done.empty():
            self.collect()
        running = self.engine.current
        if (
            running is not None
            and self._taken_back.isdisjoint(task.seq for task in running.tasks)  # else it waits again
            and self._outbox.mark_started(running, self._wall(), self.engine.on_account)
        ):
            self._lines.batch_running(running, self.device)
        if running is not None:
            self._heed_cancellations()
        if self._pace.late() and self._withdraw():
            self._put_back([task for task in self._buffer.ready if not task.begun], [])
        if self._clock() - self._looked_at >= LATER_LOOK_S:
            self._looked_at = self._clock()
            self._drop_stale(list(self._buffer))
        self.pump()
        self.engine.probe()
        if self._clock() - self._routed_at >= ROUTE_EVERY_S:
            self._routed_at = self._clock()
            try:
                self._router.pass_on()
            except (redis.RedisError, OSError) as exc:
                self._outbox.trouble("pass on", exc)
        if self._clock() - self._trimmed_at >= TRIM_EVERY_S:
            self._trimmed_at = self._clock()
            try:
                self.store.burial.trim()
            except (redis.RedisError, OSError) as exc:
                self._outbox.trouble("drop old dead letters", exc)

    def _flush(self, *, last: bool = False) -> None:
        """Tell Redis what was counted. What it does not take now is told later."""
        try:
            self.accounts.flush(last=last)
        except (redis.RedisError, OSError) as exc:
            self._outbox.trouble("account", exc)

    def _heed_cancellations(self) -> None:
        """Note which tasks were cancelled while a batch takes its time: no other part of them begins."""
        if min(self.engine.running_s, self._clock() - self._asked_at) < CANCELLED_LOOK_S:
            return
        self._asked_at = self._clock()
        self._mark_ended([task for batch in self.engine.batches for task in self._outbox.ended(batch)])

    def cancelled(self, ids: Container[str]) -> None:
        """Note that tasks were cancelled, if they are with the device."""
        self._mark_ended([task for batch in self.engine.batches for task in batch.tasks if task.id in ids])

    def _mark_ended(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            if not task.ended:
                task.ended = True
                self._lines.task_cancelled(task)
        self._lines.tell()

    def drain(self, timeout_s: float, *, crashed: bool = False) -> None:
        """Hand back what has not begun, finish the running batch, settle it. A second call does nothing.

        After a crash the record of what ran stands: if a task was the cause, its death counts.
        """
        if self._closed:
            return
        self._closed, self._crashed = True, self._crashed or crashed
        self._pace.close()
        if self.channel is not None:
            self.channel.withdraw()
        self._withdraw()
        tasks, strays = self._buffer.clear(), self._strays()
        self._outbox.release([*(task for task in tasks if task not in strays), *self._intake.waiting])
        self._intake.waiting = []
        while self.engine.current is not None:
            done = self.engine.next_done()
            if done is None:
                self._on_fatal(self.engine.failed or GpuinferError("the batch that runs does not end"))
                return
            self.engine.collected(done)
            self.accounts.ran(done.batch, done.seconds - done.waited_s)
            self._settle(self._outcomes(done))
            self._lines.batch_done(done, self.device)
            self._outbox.release(self._buffer.clear())  # with slices left
        self._outbox.release([task for task in tasks if task in strays])
        self._lines.tick(self.device, last=True)
        self.engine.close()
        # Before it has begun an epoch, what is kept under its name may be another one's.
        orderly = self.store.begun and not self._crashed
        if orderly:
            self._outbox.nothing_runs()
        deadline = self._clock() + timeout_s
        while self._outbox.unsettled and self._clock() < deadline:
            time.sleep(0.2)
            self._settle([])
        self._flush(last=True)
        if orderly:
            self._outbox.reconcile(self.held())
        counts = {"released": len(tasks), "unsettled": len(self._outbox.unsettled)}
        log.info("drained", **counts, task_ids=[task.id for task in tasks])
