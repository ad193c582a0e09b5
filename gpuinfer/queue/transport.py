# SPDX-License-Identifier: Apache-2.0
"""kombu's Redis transport with an atomic claim for the task queues.

Registered as ``gpuinfer://`` (and ``gpuinfer+socket://``). Only our queues differ from kombu's: they are
claimed by script when the worker is woken, when a batch has ended, or when a timer fires, and stand in an
in-flight hash until settled. Pidbox, reply and fan-out queues stay on kombu's stock path.
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

#: Seconds for which a producer that wakes nobody is expected to go on.
SILENT_S = 5.0
#: How often a worker that is idle again at once claims before the event loop has its turn.
CLAIMS_A_TURN = 4
#: Seconds for which a claim saves the timer's look into the lists.
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
        #: True after a claim of an idle worker that came back empty: the worker will be woken.
        self._enlisted = False
        self._silent_at = self._claimed_at = -math.inf
        super().__init__(*args, **kwargs)

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """Return kombu's parameters, with a look at the format number in each connection's handshake."""
        found: dict[str, Any] = super()._connparams(asynchronous=asynchronous)
        return found | {"redis_connect_func": layout.greeting()}

    # -- producing ------------------------------------------------------------------------

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if keys.tier_of(queue) is None:
            super()._put(queue, message, **kwargs)
            return
        key = keys.list_key(queue, self._get_message_priority(message))
        batch = kwargs.pop("_publish_batch", None)
        if batch is not None:  # by its text: in a batch nobody could load the script after a NOSCRIPT
            batch.add("eval", source("put"), 1, key, dumps(message))
            return
        with self.conn_or_acquire() as client:
            bind(client, "put")(keys=[key], args=[dumps(message)])

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind as kombu does; a full Redis must not stop a worker from listening to its fan-out queues.

        Publishers to a fan-out exchange do not read the binding that cannot be written.
        """
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except OutOfMemoryError:
            if queue not in self._fanout_queues:
                raise

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        """Pop one message, for AMQP's basic.get. Refused for our queues: it would be lost with its reader."""
        if keys.tier_of(queue) is None:
            return super()._get(queue)
        raise UsageError(
            "its tasks are claimed by gpuinfer's workers, and cannot be fetched one by one (basic.get); "
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
        """End all that waits in a queue of ours, of all its models, as revoked; return how many tasks."""
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
            raise RuntimeError("tasks are claimed for a sink alone")
        return self.sink.store

    def basic_cancel(self, consumer_tag: str) -> Any:
        self.withdraw()
        return super().basic_cancel(consumer_tag)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Wait for kombu's own queues as kombu does; while this worker is idle, also to be woken."""
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
        """Return the claim to send along with a wait; None where this worker does not wait for tasks."""
        if self.sink is None or not self.served or self.sink.state != "idle":
            return None
        for _ in range(CLAIMS_A_TURN):  # until one comes back empty, nobody would wake it
            if self._enlisted or not self.claim():
                break
        if self.sink.state != "idle" or not self.sink.wants():
            return None
        if not self._enlisted:
            self.store.wake()  # the event loop has a turn, then the claim that waits runs at once
        self.store.serve(self.served)
        order = self.store.order(self.sink.wants(), begin=True)
        if order is None and not self.claim():  # an epoch had to begin
            order = self.store.order(self.sink.wants(), begin=True)
        return order

    def _on_connection_disconnect(self, connection: Any) -> None:
        """Forget the claim whose answer this connection would have brought: what it took is not known."""
        if self._wait.order is not None and self._in_poll is connection:
            self._wait.order = None
            self.store.mark_uncertain()
        super()._on_connection_disconnect(connection)

    def _brpop_read(self, **options: Any) -> Any:
        """Read what woke this worker, and what the claim behind it took."""
        order = self._wait.order
        if order is None:
            return super()._brpop_read(**options)
        connection = self.client.connection
        try:
            woke, claimed = answer(connection), answer(connection)
        except BaseException:
            connection.disconnect()  # what is left of the answers is nobody's
            raise
        finally:
            self._in_poll = self._wait.order = None
            self._flush_brpop_reauth()
        self._claimed_at = stock.monotonic()
        came = 0
        try:
            came = self._take(order, claimed)
        finally:  # what was popped is gone from Redis
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
        """Hand on what an ordered claim took; return how many tasks."""
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
        """True while a claim is on its way whose answer will be taken."""
        return self.sink is not None and self._wait.stands(self.store)

    def withdraw(self) -> None:
        """Cancel the outstanding claim; release anything it took."""
        self._enlisted = False
        if self.sink is not None and self._wait.order is not None and (self.ordered or self.store.uncertain):
            self.store.mark_uncertain()
            # The next claim, or the end, does it.
            with suppress(RedisError, OSError, WorkerRunning, TakenBack, UnusableRedis):
                self._reconcile(self.sink)

    def _reconcile(self, sink: Sink) -> None:
        delivered = {seq for tag in self.qos._delivered if (seq := seq_of(tag)) is not None}
        self.store.reconcile(sink.held() | delivered)

    def look(self) -> None:
        """Look into the lists once, for producers that wake nobody."""
        if self.ordered and self._wait.overdue(self._in_poll):
            self.withdraw()
        if not self.listening or not self.store.waits():
            return
        if not self.ordered:
            self.claim(look=True)
        elif self.store.plain.index():
            self._silent_at = stock.monotonic()
            self._end_wait()
        else:
            self._skip_foreign()

    def _skip_foreign(self) -> None:
        """Name once what stands under a list's name and is no list."""
        for name, kind in self.store.plain.foreign().items():
            hint = (
                "no task can be sent there; find out who has made it, and delete it; then restart the workers"
            )
            log.error("foreign_key", key=name, type=kind, hint=hint)

    def _end_wait(self) -> None:
        """Let the claim that waits run now. Where Redis does not allow it, wake this worker."""
        if not self._wait.end(self.store):
            with suppress(OutOfMemoryError):  # found when the wait is over
                self.store.wake()

    def again(self) -> None:
        """Claim when a batch has ended, unless a claim waits and nobody was silent of late."""
        if self.silent:
            self.look()
        else:
            self.claim()

    @property
    def silent(self) -> bool:
        """True when there were tasks of late that nobody had told of."""
        return bool(stock.monotonic() - self._silent_at < SILENT_S)

    @property
    def fresh(self) -> bool:
        """True when a claim has just looked into all lists, and nobody was silent of late."""
        return bool(stock.monotonic() - self._claimed_at < FRESH_S) and not self.silent

    @property
    def listening(self) -> bool:
        """True when there are task queues to claim from, and room for a task."""
        return not self.closed and self.sink is not None and bool(self.served) and bool(self.sink.wants())

    def claim(self, *, look: bool = False) -> int:
        """Claim what is wanted and hand it on; return how many tasks came."""
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
            tasks = store.claim(wants, state=state, begin=state == "idle", look=look)
        except (WorkerRunning, TakenBack, UnusableRedis) as exc:
            sink.fenced(exc)
            return 0
        self._enlisted = state == "idle"
        return self._hand_on(sink, tasks)

    def deliver(self, task: Claimed) -> None:
        """Hand one claimed task on as a kombu message, to Celery's ordinary strategy."""
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
        """Claimed tasks on kombu's path, by delivery tag; entries of settled ones are dropped."""
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
        """Look into the lists, for producers that wake nobody."""
        for channel in list(self.channels):
            if not channel.fresh:
                channel.look()


def register() -> None:
    """Make ``gpuinfer://`` known to kombu."""
    TRANSPORT_ALIASES["gpuinfer"] = f"{__name__}:Transport"
