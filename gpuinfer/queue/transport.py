# SPDX-License-Identifier: Apache-2.0
"""kombu's Redis transport with an atomic claim for the task queues.

Registered as ``gpuinfer://`` (and ``gpuinfer+socket://``). Only our queues differ from kombu's: a script
claims their tasks when the worker is woken, when a batch has ended, or when a timer fires, and keeps them in
an in-flight hash until they are settled. Pidbox, reply and fan-out queues work as in kombu.
"""

from __future__ import annotations

import math
from contextlib import suppress
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as stock
from kombu.utils.json import dumps, loads
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError

from gpuinfer.errors import DeadLettered, TakenBack, UnusableRedis, UsageError, WorkerRunning
from gpuinfer.log import get_logger
from gpuinfer.queue import format as layout
from gpuinfer.queue import keys
from gpuinfer.queue.claims import Claimed, Order
from gpuinfer.queue.purge import lines, purge
from gpuinfer.queue.qos import TAG, QoS, seq_of
from gpuinfer.queue.scripts import bind, source
from gpuinfer.queue.sink import Sink
from gpuinfer.queue.store import Store
from gpuinfer.queue.waiting import WaitingClaim, answer
from gpuinfer.settings import QUEUES, QueueSettings

log = get_logger(__name__)

#: For this long after a plain producer's task was found, more of them are expected. They wake no worker.
SILENT_S = 5.0
#: Maximum claims in a row, by a worker that is idle again at once, before the event loop runs.
CLAIMS_A_TURN = 4
#: For this long after a claim, the timer does not check the lists.
FRESH_S = 0.025


class Channel(stock.Channel):  # type: ignore[misc]  # kombu is not annotated
    """A channel whose task queues are claimed, once it has a sink."""

    QoS = QoS
    priority_steps = list(keys.PRIORITIES)  # noqa: RUF012  # kombu's own is a list; never changed
    #: QueueSettings as a dictionary: transport options travel as plain data.
    queue_settings: dict[str, Any] = {}  # noqa: RUF012  # set per instance from the transport options
    from_transport_options = (*stock.Channel.from_transport_options, "queue_settings")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sink: Sink | None = None
        self._wait = WaitingClaim()
        #: True after an idle worker's claim found nothing: the worker is then listed as idle, to be woken.
        self._enlisted = False
        self._silent_at = self._claimed_at = -math.inf
        super().__init__(*args, **kwargs)

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """Return kombu's parameters; each connection's handshake checks the format number."""
        found: dict[str, Any] = super()._connparams(asynchronous=asynchronous)
        return found | {"redis_connect_func": layout.greeting()}

    # -- producing ------------------------------------------------------------------------

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if keys.tier_of(queue) is None:
            super()._put(queue, message, **kwargs)
            return
        key = keys.list_key(queue, self._get_message_priority(message))
        batch = kwargs.pop("_publish_batch", None)
        if batch is not None:  # EVAL, because within a batch we cannot load the script after a NOSCRIPT
            batch.add("eval", source("put"), 1, key, dumps(message))
            return
        with self.conn_or_acquire() as client:
            bind(client, "put")(keys=[key], args=[dumps(message)])

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind as kombu does; a full Redis must not stop a worker from listening to its fan-out queues.

        Publishers to a fan-out exchange do not read the binding, so it may be missing.
        """
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except OutOfMemoryError:
            if queue not in self._fanout_queues:
                raise

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        """Pop one message, for AMQP's basic.get. Refused for our queues: a reader that dies would lose it."""
        if keys.tier_of(queue) is None:
            return super()._get(queue)
        raise UsageError(
            "gpuinfer's workers claim its tasks; they cannot be fetched one by one (basic.get); "
            "`gpuinfer queue status` shows what waits",
            queue,
        )

    def _size(self, queue: str) -> int:
        """Count a queue's messages, as kombu does but without MULTI, which a full Redis refuses."""
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for priority in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, priority))
            return sum(pipe.execute())

    def _purge(self, queue: str) -> int:
        """Revoke all waiting tasks of a queue of ours, of all its models; return how many."""
        if keys.tier_of(queue) is None:
            return int(super()._purge(queue))
        settings = QueueSettings.model_validate(self.queue_settings)
        with self.conn_or_acquire() as client:
            return purge(client, lines(client, queue.partition(keys.CALLER)[0]), settings)

    # -- consuming ------------------------------------------------------------------------

    @property
    def served(self) -> tuple[str, ...]:
        """The task queues consumed here, the most urgent first."""
        active = set(self._active_queues)
        return tuple(queue for queue in QUEUES if queue in active)

    @property
    def store(self) -> Store:
        """The sink's store, which outlives this channel."""
        if self.sink is None:
            raise RuntimeError("this channel has no sink to claim tasks for")
        return self.sink.store

    def basic_cancel(self, consumer_tag: str) -> Any:
        self.withdraw()
        return super().basic_cancel(consumer_tag)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Wait for kombu's own queues as kombu does; while this worker is idle, also for a wake-up."""
        active = self._queue_cycle.consume(len(self.active_queues))
        names: list[str] = [
            self._q_for_pri(queue, pri)
            for pri in self.priority_steps
            for queue in active
            if queue not in QUEUES
        ]
        order = self._order()
        if order is not None:
            names.append(keys.wake(self.store.worker))
        if not names:
            return
        self._in_poll = self.client.connection
        self._brpop_sent_at = stock.monotonic()
        self._wait.send(self._in_poll, names, timeout or self.brpop_timeout or 0, order)

    def _order(self) -> Order | None:
        """Return the claim to send along with a wait; None if this worker does not wait for tasks."""
        if self.sink is None or not self.served or self.sink.state != "idle":
            return None
        for _ in range(CLAIMS_A_TURN):  # the worker is listed as idle only after a claim finds nothing
            if self._enlisted or not self.claim():
                break
        if self.sink.state != "idle" or not self.sink.wants():
            return None
        if not self._enlisted:
            self.store.wake()  # the wait ends at once: the event loop runs, then the claim
        self.store.serve(self.served)
        order = self.store.order(self.sink.wants(), begin=True)
        if order is None and not self.claim():  # an epoch had to begin
            order = self.store.order(self.sink.wants(), begin=True)
        return order

    def _on_connection_disconnect(self, connection: Any) -> None:
        """Forget the claim whose answer is lost with this connection: the tasks that it took are unknown."""
        if self._wait.order is not None and self._in_poll is connection:
            self._wait.order = None
            self.store.mark_uncertain()
        super()._on_connection_disconnect(connection)

    def _brpop_read(self, **options: Any) -> Any:
        """Read what ended the wait, and the tasks that the claim after it took."""
        order = self._wait.order
        if order is None:
            return super()._brpop_read(**options)
        connection = self.client.connection
        try:
            woke, claimed = answer(connection), answer(connection)
        except BaseException:
            connection.disconnect()  # else the next call would read the remaining answers
            raise
        finally:
            self._in_poll = self._wait.order = None
            self._flush_brpop_reauth()
        self._claimed_at = stock.monotonic()
        came = 0
        try:
            came = self._take(order, claimed)
        finally:  # Redis has already removed the message that was popped
            if woke and not isinstance(woke, ResponseError):
                self._deliver_own(*woke)
        if isinstance(woke, ResponseError):
            raise woke
        if not woke and not came:
            raise Empty
        return True

    def _deliver_own(self, key: bytes, value: bytes) -> None:
        """Deliver a message of one of kombu's own queues."""
        name = key.decode()
        if not name.startswith(keys.WAKE_PREFIX):
            self._queue_cycle.rotate(queue := name.rsplit(self.sep, 1)[0])
            self.connection._deliver(loads(value.decode()), queue)

    def _take(self, order: Order, claimed: Any) -> int:
        """Pass the tasks of an outstanding claim to the sink; return how many."""
        if self.sink is None or not self.store.current(order):
            return 0
        if isinstance(claimed, NoScriptError):
            return self.claim()
        try:
            return self._hand_on(self.sink, self.store.take(order, claimed))
        except (WorkerRunning, TakenBack, UnusableRedis) as exc:
            self.sink.fenced(exc)
            return 0

    def _hand_on(self, sink: Sink, tasks: list[Claimed]) -> int:
        if tasks:
            self._enlisted = False
            sink.receive(self, tasks)
        return len(tasks)

    @property
    def ordered(self) -> bool:
        """True while there is an outstanding claim whose tasks will belong to this worker."""
        return self.sink is not None and self._wait.outstanding(self.store)

    def withdraw(self) -> None:
        """Cancel the outstanding claim; release anything it took."""
        self._enlisted = False
        if self.sink is not None and self._wait.order is not None and (self.ordered or self.store.uncertain):
            self.store.mark_uncertain()
            # On an error the next claim reconciles, or else the restore after this process's end.
            with suppress(RedisError, OSError, WorkerRunning, TakenBack, UnusableRedis):
                self._reconcile(self.sink)

    def _reconcile(self, sink: Sink) -> None:
        delivered = {seq for tag in self.qos._delivered if (seq := seq_of(tag)) is not None}
        self.store.reconcile(sink.held() | delivered)

    def check_lists(self) -> None:
        """Check the lists once, for tasks of plain producers, which wake no worker."""
        if self.ordered and self._wait.overdue(self._in_poll):
            self.withdraw()
        if not self.listening or not self.store.waits():
            return
        if not self.ordered:
            self.claim(search=True)
        elif self.store.plain.index():
            self._silent_at = stock.monotonic()
            self._end_wait()
        else:
            self._skip_foreign()

    def _skip_foreign(self) -> None:
        """Skip keys that have a list's name but another type, and log each once."""
        for name, kind in self.store.plain.foreign().items():
            hint = (
                "no task can be sent to this queue: find out what created the key, delete it, then restart "
                "the workers"
            )
            log.error("foreign_key", key=name, type=kind, hint=hint)

    def _end_wait(self) -> None:
        """Let the outstanding claim run now. If Redis does not permit that, wake this worker instead."""
        if not self._wait.end(self.store):
            with suppress(OutOfMemoryError):  # the claim then runs when the wait times out
                self.store.wake()

    def again(self) -> None:
        """Claim after a batch has ended; check the lists, too, if plain producers were active recently."""
        if self.silent:
            self.check_lists()
        else:
            self.claim()

    @property
    def silent(self) -> bool:
        """True if a plain producer, which wakes no worker, submitted tasks recently."""
        return bool(stock.monotonic() - self._silent_at < SILENT_S)

    @property
    def fresh(self) -> bool:
        """True if a claim was made just now, and no plain producer was active recently."""
        return bool(stock.monotonic() - self._claimed_at < FRESH_S) and not self.silent

    @property
    def listening(self) -> bool:
        """True if there are task queues to claim from, and the sink wants tasks."""
        return not self.closed and self.sink is not None and bool(self.served) and bool(self.sink.wants())

    def claim(self, *, search: bool = False) -> int:
        """Claim the wanted tasks and pass them to the sink; return how many."""
        sink = self.sink
        if sink is None or self.ordered or self.closed or not self.served:
            return 0
        wants = sink.wants()
        if not wants:
            return 0
        store = self.store
        store.serve(self.served)
        try:
            if store.uncertain:
                self._reconcile(sink)
            state = sink.state
            tasks = store.claim(wants, state=state, begin=state == "idle", search=search)
        except (WorkerRunning, TakenBack, UnusableRedis) as exc:
            sink.fenced(exc)
            return 0
        self._enlisted = state == "idle"
        return self._hand_on(sink, tasks)

    def deliver(self, task: Claimed) -> None:
        """Pass one claimed task, as a kombu message, to Celery's own strategy."""
        try:
            message = loads(task.payload)
            message["properties"]["delivery_tag"] = f"{TAG}{task.seq}"
            if message.get("gpuinfer"):
                message["headers"]["redelivered"] = True
        except (ValueError, TypeError, KeyError) as exc:
            self.store.bury(task.seq, task.list_key, task.payload, DeadLettered(f"cannot be decoded: {exc}"))
            return
        self._raw[f"{TAG}{task.seq}"] = task
        self.connection._deliver(message, keys.place_of(task.list_key).tier)

    @property
    def _raw(self) -> dict[str, Claimed]:
        """Claimed tasks that were passed to kombu, by delivery tag; settled ones are removed."""
        held: dict[str, Claimed] = self.__dict__.setdefault("_raw_tasks", {})
        for tag in [tag for tag in held if tag not in self.qos._delivered]:
            del held[tag]
        return held

    def bury(self, delivery_tag: str, seq: int) -> None:
        """Move a rejected message to the dead letters."""
        task = self._raw.get(delivery_tag)
        if task is not None:
            error = DeadLettered("was rejected: no such task, or a message this worker cannot read")
            self.store.bury(seq, task.list_key, task.payload, error)


class Transport(stock.Transport):  # type: ignore[misc]  # kombu is not annotated
    """kombu's Redis transport with claiming channels and a timer for silent producers."""

    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        options = connection.client.transport_options
        poll_ms = options.get("queue_settings", {}).get("poll_ms", QueueSettings().poll_ms)
        loop.call_repeatedly(poll_ms / 1000, self.claim_all)

    def claim_all(self) -> None:
        """Check the lists, for tasks of plain producers, which wake no worker."""
        for channel in list(self.channels):
            if not channel.fresh:
                channel.check_lists()


def register() -> None:
    """Make ``gpuinfer://`` known to kombu."""
    TRANSPORT_ALIASES["gpuinfer"] = f"{__name__}:Transport"
