# SPDX-License-Identifier: Apache-2.0
"""The batcher: receives claimed tasks, keeps the inference thread busy, and settles what it returns.

Runs on the main thread, inside Celery's event loop::

    claim ─► receive ─► buffer ─► pump: begin, submit ─► (inference thread) ─► collect: settle ─► claim

``holdings`` has the tasks it holds, ``claiming`` decides what to claim, ``feeding`` begins batches,
``outcomes`` assigns their results to tasks, ``pace`` knows how long batches take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import redis

from gpuinfer.errors import DeviceError, GpuinferError, TakenBack, UnusableRedis, WorkerRunning
from gpuinfer.log import get_logger
from gpuinfer.models.manifest import Manifest
from gpuinfer.queue.claims import Claimed, State, Wants
from gpuinfer.queue.router import Router
from gpuinfer.queue.sink import TaskChannel
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings
from gpuinfer.worker import task_log
from gpuinfer.worker.accounting import Accounts
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.claiming import Claiming
from gpuinfer.worker.engine import Done, Engine
from gpuinfer.worker.feeding import Feeder
from gpuinfer.worker.holdings import Holdings
from gpuinfer.worker.outcomes import Outcomes
from gpuinfer.worker.pace import LONG_BATCH_S, Pace
from gpuinfer.worker.task import Task
from gpuinfer.worker.task_log import TaskLog
from gpuinfer.worker.upkeep import Upkeep

log = get_logger(__name__)

#: Maximum seconds that the event loop blocks for a batch when no other task is held.
PATIENCE_S = 0.002
#: Seconds between two checks for running tasks that were cancelled.
CANCELLED_CHECK_S = 0.5
#: Seconds between two checks for waiting tasks that have expired.
EXPIRED_CHECK_S = 1.0


class Batcher:
    """The channel's sink. There is one per worker process; it is kept when the connection is replaced."""

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
        self._celery = celery_state
        self._on_fatal = on_fatal
        self._clock = clock
        self._wall = wall
        self._lines = TaskLog(settings.log, clock)
        self._held = held = Holdings(store, engine, manifests, settings, celery_state, self._lines)
        self._buffer, self._outbox, self._intake = held.buffer, held.outbox, held.intake
        self.accounts = Accounts(store)
        self._pace = Pace(engine)
        self._claiming = Claiming(held, self._pace, clock)
        self._feeder = Feeder(held, self._claiming, self._pace, clock, wall)
        self._outcomes = Outcomes(held, settings.queue, self.accounts, device, clock, wall)
        router = Router(store, settings.queue)
        self._upkeep = Upkeep(store, router, self.accounts, self._outbox, clock)
        self._checked_at = self._asked_at = clock()
        self.channel: TaskChannel | None = None

    @property
    def state(self) -> State:
        """Busy while a batch runs; free when none runs but tasks are held; idle when none are held."""
        return self._held.state

    @property
    def done(self) -> int:
        """How many tasks have ended in this process."""
        return self._celery.done

    @property
    def closed(self) -> bool:
        """Whether the worker has been drained, or drains now."""
        return self._held.closed

    def attach(self, channel: TaskChannel, dispatcher: Any) -> None:
        """Use a new connection."""
        self.channel, self._celery.dispatcher = channel, dispatcher

    def show(self) -> None:
        """Show Celery which tasks are held now."""
        self._celery.show()

    def detach(self) -> None:
        """Continue without a connection; batches that run meanwhile are settled after the reconnection."""
        self.channel = self._celery.dispatcher = None
        self.store.mark_uncertain()  # a claim whose answer was not read may have taken tasks

    # -- the channel's side ---------------------------------------------------------------

    def wants(self) -> Wants:
        """Return what to claim."""
        return self._claiming.wants()

    def held(self) -> set[int]:
        """Return the seqs of all tasks that are claimed and not settled."""
        return self._held.seqs()

    def end(self, error: GpuinferError) -> None:
        """End the process at once, for a reason that its tasks have not caused."""
        self._on_fatal(error)

    def fenced(self, error: WorkerRunning | TakenBack | UnusableRedis) -> None:
        """End the process: another one claims under this worker's name, or Redis has another format.

        If a reaper put the tasks back because the worker seemed dead, begin a new epoch instead.
        """
        if not isinstance(error, TakenBack):
            self._on_fatal(error)
            return
        self._held.lose(error)
        try:
            self.store.rejoin()
        except (redis.RedisError, OSError, TakenBack) as exc:
            self._outbox.trouble("begin an epoch", exc)  # tried again at the next claim
        except (WorkerRunning, UnusableRedis) as exc:
            self._on_fatal(exc)

    def receive(self, channel: TaskChannel, claims: Sequence[Claimed]) -> None:
        """Read claimed tasks into the buffer; tasks that can never run fail here."""
        self.channel = channel
        self._outbox.claimed(claims)
        self._claiming.read(channel, claims)
        if self._held.finishing is not None:
            return
        self._feeder.pump(channel)
        self._held.settle()  # clears the record that the claim wrote, if its task has not begun
        if self._claiming.fills(claims):
            self.engine.wake()  # more tasks may wait: claim the next batch while this one runs
        else:
            self._wait_briefly()

    # -- collecting -----------------------------------------------------------------------

    def collect(self) -> None:
        """Take the batches that the inference thread has finished; start the next, then settle."""
        while not self.engine.done.empty():
            self._finish(self.engine.done.get())
        self._pace.watch()
        if self.channel is not None:  # nothing is claimed once it is closed
            self.channel.again()

    def _wait_briefly(self) -> None:
        """Wait briefly for the batch when nothing else is held: a pass of the event loop takes longer."""
        if self.engine.current is None or self._buffer.ready:
            return
        done = self.engine.wait(PATIENCE_S)
        if done is not None:
            self._finish(done)
            if self.channel is not None and self.channel.silent:
                self.engine.wake()  # to claim again

    def _finish(self, done: Done) -> None:
        """Start the next batch, then write the final states of this one.

        An exception here ends the process: its tasks are put back, and the crash is charged to this batch.
        """
        self.engine.collected(done)
        took = done.seconds - done.waited_s
        self._pace.ran(done.batch.model, took)
        self.accounts.ran(done.batch, took)
        self._pace.watch()
        if done.fatal is not None:
            task_log.batch_lost(done)
            self._on_fatal(done.fatal)
            return
        if any(task.envelope.deaths for task in done.batch.tasks):
            self._outbox.note_reading(self.engine.chargeable)  # a crash after this point is not charged to it
        try:
            if done.complete:  # before the results are written, so that the device does not wait for that
                self._overtake(done)
                self._feeder.pump(self.channel)
            finals = self._outcomes.distribute(done)
            if not done.complete:  # tasks with inputs left are in the buffer now, and compete with new ones
                self._overtake(done)
            self._held.dropped -= {task.seq for task in done.batch.tasks}
            self._feeder.pump(self.channel)
            self._held.settle(finals)
        except Exception as exc:
            self._lines.tell()
            log.exception("batch_unfinished", task_ids=[task.id for task in done.batch.tasks])
            self._held.crashed = True
            reason = f"a batch could not be finished: {type(exc).__name__}: {exc}"
            self._on_fatal(GpuinferError(reason))
        else:
            self._lines.batch_done(done, self.device)

    def _overtake(self, done: Done) -> None:
        """After a long batch, claim the next one before the final states of this one are written.

        Nothing was claimed while it ran. Claim also if a batch is waiting: nobody tells a worker of more
        urgent tasks. And tasks of plain producers are searched for only when a worker may claim, which in a
        series of long batches is now.
        """
        if done.seconds < LONG_BATCH_S or self.channel is None or self._held.closed:
            return
        self._held.finishing = done.batch
        try:
            self.channel.claim(search=True)
        except (redis.RedisError, OSError):
            pass  # the event loop notices it, and reconnects
        finally:
            self._held.finishing = None

    # -- from start to end ----------------------------------------------------------------

    def tick(self) -> None:
        """Do periodic work, and what has waited for Redis or a probe. Called a few times a second."""
        if self.engine.failed is not None:
            if isinstance(self.engine.failed, DeviceError):
                task_log.device_lost(self.engine.failed, self.device)
            self._on_fatal(self.engine.failed)
            return
        self._held.settle()
        self._upkeep.flush()
        self._lines.tick(self.device)
        if self.engine.stalled and (len(self._buffer) or self._intake.waiting):
            unread, self._intake.waiting = self._intake.waiting, []
            self._held.put_back(list(self._buffer), unread)
        if not self.engine.done.empty():
            self.collect()
        running = self.engine.current
        if (
            running is not None
            and self._held.taken_back.isdisjoint(task.seq for task in running.tasks)  # those are queued again
            and self._outbox.mark_started(running, self._wall(), self.engine.chargeable)
        ):
            self._lines.batch_running(running, self.device)
        if running is not None:
            self._find_cancelled()
        if self._pace.late() and self._held.withdraw():
            self._held.put_back([task for task in self._buffer.ready if not task.begun])
        if self._clock() - self._checked_at >= EXPIRED_CHECK_S:
            self._checked_at = self._clock()
            self._feeder.drop_stale(list(self._buffer))
        self._feeder.pump(self.channel)
        self.engine.probe()
        self._upkeep.tick()

    def _find_cancelled(self) -> None:
        """Ask Redis which tasks of a long batch were cancelled; their remaining inputs do not run."""
        if min(self.engine.running_s, self._clock() - self._asked_at) < CANCELLED_CHECK_S:
            return
        self._asked_at = self._clock()
        self._mark_ended([task for batch in self.engine.batches for task in self._outbox.ended(batch)])

    def cancelled(self, ids: Container[str]) -> None:
        """Mark the given tasks as cancelled, if they are in the engine."""
        self._mark_ended([task for batch in self.engine.batches for task in batch.tasks if task.id in ids])

    def _mark_ended(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            if not task.ended:
                task.ended = True
                self._lines.task_cancelled(task)
        self._lines.tell()

    def drain(self, timeout_s: float, *, crashed: bool = False) -> None:
        """Return tasks that have not begun, finish the running batch and settle it.

        A second call does nothing. After a crash the record of the running batches stays: the crash is
        charged to them.
        """
        held = self._held
        if held.closed:
            return
        held.closed, held.crashed = True, held.crashed or crashed
        self._pace.close()
        if self.channel is not None:
            self.channel.withdraw()
        held.withdraw()
        tasks, strays = self._buffer.clear(), held.strays()
        self._outbox.release([*(task for task in tasks if task not in strays), *self._intake.waiting])
        self._intake.waiting = []
        while self.engine.current is not None:
            done = self.engine.next_done()
            if done is None:
                self._on_fatal(self.engine.failed or GpuinferError("the running batch does not end"))
                return
            self.engine.collected(done)
            self.accounts.ran(done.batch, done.seconds - done.waited_s)
            held.settle(self._outcomes.distribute(done))
            self._lines.batch_done(done, self.device)
            self._outbox.release(self._buffer.clear())  # tasks with inputs left
        self._outbox.release([task for task in tasks if task in strays])
        self._lines.tick(self.device, last=True)
        self.engine.close()
        # Until this process has begun an epoch, the records under its name may be those of another process.
        orderly = self.store.begun and not held.crashed
        if orderly:
            self._outbox.nothing_runs()
        deadline = self._clock() + timeout_s
        while self._outbox.unsettled and self._clock() < deadline:
            time.sleep(0.2)
            held.settle()
        self._upkeep.flush(last=True)
        if orderly:
            self._outbox.reconcile(self.held())
        counts = {"released": len(tasks), "unsettled": len(self._outbox.unsettled)}
        log.info("drained", **counts, task_ids=[task.id for task in tasks])
