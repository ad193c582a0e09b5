# SPDX-License-Identifier: Apache-2.0
"""kombu's Redis transport with an atomic claim for the task queues.

Registered as ``gpuinfer://`` (and ``gpuinfer+socket://``). Only the queues realtime, default and
batch differ from kombu's: they are claimed by script when their bell rings (BRPOP, with the claim sent
along) or a timer fires, and stand in an in-flight hash until settled. Pidbox, reply and fan-out queues
stay on kombu's stock path.
"""

from __future__ import annotations

import math
from contextlib import suppress
from queue import Empty
from typing import Any

from hiredis import pack_command
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as stock
from kombu.utils.json import dumps, loads
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError

from gpuinfer.errors import DeadLettered, WorkerRunning
from gpuinfer.queue import keys
from gpuinfer.queue.qos import TAG, QoS, seq_of
from gpuinfer.queue.sink import Sink
from gpuinfer.queue.store import Claimed, Order, Store
from gpuinfer.settings import QUEUES, QueueSettings

#: Seconds for which a producer that did not ring is expected to go on.
SILENT_S = 5.0
#: Seconds for which a claim saves the timer's look into the lists.
FRESH_S = 0.025
#: Seconds beyond the end of a wait after which its answer is given up: the connection has gone silent.
OVERDUE_S = 0.5


class Channel(stock.Channel):  # type: ignore[misc]  # kombu is not annotated
    """A channel whose task queues are claimed."""

    QoS = QoS
    priority_steps = list(keys.PRIORITIES)  # noqa: RUF012  # kombu's own is a list; never changed
    #: Node name of the worker; names the in-flight hash.
    worker = ""
    #: QueueSettings as a dictionary: transport options travel as plain data.
    queue_settings: dict[str, Any] = {}  # noqa: RUF012  # set per instance from the transport options
    from_transport_options = (*stock.Channel.from_transport_options, "worker", "queue_settings")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sink: Sink | None = None
        self._store: Store | None = None
        #: The claim that was sent behind the bells, until its answer is read.
        self._order: Order | None = None
        #: The socket that waits for bells, and the id that Redis has given it.
        self._waiting: tuple[Any, int | None] = (None, None)
        self._silent_at = self._claimed_at = -math.inf
        super().__init__(*args, **kwargs)

    # -- producing ------------------------------------------------------------------------

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if queue not in QUEUES:
            super()._put(queue, message, **kwargs)
            return
        key = keys.list_key(queue, self._get_message_priority(message))
        bell = keys.bell(queue)
        commands = (("lpush", key, dumps(message)), ("lpush", bell, 1), ("ltrim", bell, 0, 63))
        batch = kwargs.pop("_publish_batch", None)
        if batch is not None:
            for name, *args in commands:
                batch.add(name, *args)
            return
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for name, *args in commands:
                getattr(pipe, name)(*args)
            pipe.execute()

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind as kombu does; a full Redis must not stop a worker from listening to its fan-out queues.

        Publishers to a fan-out exchange do not read the binding that cannot be written.
        """
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except OutOfMemoryError:
            if queue not in self._fanout_queues:
                raise

    def _size(self, queue: str) -> int:
        """Count a queue's messages, as kombu does but without MULTI, which a full Redis refuses."""
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for priority in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, priority))
            return sum(pipe.execute())

    # -- consuming ------------------------------------------------------------------------

    @property
    def served(self) -> tuple[str, ...]:
        """The task queues consumed here, the most urgent first."""
        active = set(self._active_queues)
        return tuple(queue for queue in QUEUES if queue in active)

    @property
    def store(self) -> Store:
        """The sink's store, which outlives this channel; without a sink, one of the channel's own."""
        if self.sink is not None:
            return self.sink.store
        if self._store is None:
            settings = QueueSettings(**self.queue_settings)
            self._store = Store(self._create_client(), self.worker, self.served, settings)
        return self._store

    def basic_consume(self, queue: str, *args: Any, **kwargs: Any) -> Any:
        result = super().basic_consume(queue, *args, **kwargs)
        if queue in QUEUES:
            self.connection._callbacks[keys.bell(queue)] = lambda _: self._on_bell(queue)
        return result

    def basic_cancel(self, consumer_tag: str) -> Any:
        self.withdraw()
        return super().basic_cancel(consumer_tag)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Wait for kombu's own queues as kombu does, and for ours by their bells.

        The claim goes along in the same packet: Redis runs it the moment a bell has rung, or the time is
        over, which saves a round trip. Until its answer is read there is no other claim.
        """
        active = self._queue_cycle.consume(len(self.active_queues))
        wanted: list[Any] = [
            self._q_for_pri(queue, pri)
            for pri in self.priority_steps
            for queue in active
            if queue not in QUEUES
        ]
        order = None
        room, better_than = self._room()
        if room and better_than is None:  # else the bells are for others; the timer finds what is urgent
            served = self.served
            wanted += [keys.bell(queue) for queue in served]
            if self.sink is not None and served:
                self.store.serve(served)
                order = self.store.order(room, begin=self.sink.idle)
        if not wanted:
            return
        connection = self.client.connection
        commands: list[tuple[Any, ...]] = [("BRPOP", *wanted, timeout or self.brpop_timeout or 0)]
        if order is not None:
            commands.append(order.command)
            self._learn_id(connection)
        self._in_poll, self._order = connection, order
        self._brpop_sent_at = stock.monotonic()
        connection.send_packed_command([b"".join(map(pack_command, commands))])

    def _learn_id(self, connection: Any) -> None:
        """Ask Redis once how it calls this connection: by that name its wait can be ended."""
        if self._waiting[0] is not connection._sock:
            connection.send_command("CLIENT", "ID")
            found = self._answer()
            self._waiting = connection._sock, found if isinstance(found, int) else None

    def _on_connection_disconnect(self, connection: Any) -> None:
        """Forget the claim whose answer this connection would have brought: what it took is not known."""
        if self._order is not None and self._in_poll is connection:
            self._order = None
            self.store.doubt()
        super()._on_connection_disconnect(connection)

    def _brpop_read(self, **options: Any) -> Any:
        """Read what rang, and what the claim behind it took."""
        order = self._order
        if order is None:
            return super()._brpop_read(**options)
        try:
            rung, answer = self._answer(), self._answer()
        except BaseException:
            self.client.connection.disconnect()  # what is left of the answers is nobody's
            raise
        finally:
            self._in_poll = self._order = None
            self._flush_brpop_reauth()
        self._claimed_at = stock.monotonic()
        came = 0
        try:
            came = self._take(order, answer)
        finally:  # what was popped is gone from Redis
            if rung and not isinstance(rung, ResponseError):
                self._rung(order, *rung, came=came)
        if isinstance(rung, ResponseError):
            raise rung
        if not rung and not came:
            raise Empty
        return True

    def _rung(self, order: Order, key: bytes, value: bytes, *, came: int) -> None:
        """Deliver a message of kombu's own; pass a bell on when the claim was for nothing."""
        name = key.decode()
        queue = name.removeprefix(keys.BELL_PREFIX)
        if queue == name:
            self._queue_cycle.rotate(queue := name.rsplit(self.sep, 1)[0])
            self.connection._deliver(loads(value.decode()), queue)
        elif not came and not self.store.current(order):
            self._on_bell(queue)

    def _answer(self) -> Any:
        """Return the next answer on the waiting connection, be it an error."""
        try:
            return self.client.connection.read_response()
        except ResponseError as exc:
            return exc

    def _take(self, order: Order, answer: Any) -> int:
        """Hand on what an ordered claim took; return how many tasks."""
        if self.sink is None or not self.store.current(order):
            return 0
        if isinstance(answer, NoScriptError):
            return self.claim()
        try:
            tasks = self.store.take(order, answer)
        except WorkerRunning as exc:
            self.sink.fenced(exc)
            return 0
        if tasks:
            self.sink.receive(self, tasks)
        return len(tasks)

    def _room(self) -> tuple[int, int | None]:
        if self.sink is not None:
            return self.sink.room()
        estimate = self.qos.can_consume_max_estimate()
        return (1 if estimate is None else int(estimate)), None

    def _on_bell(self, queue: str) -> None:
        if self._room()[0]:
            self.claim()
        else:  # it was for another worker: pass it on
            with suppress(OutOfMemoryError):  # the others' timers find it
                self._create_client().lpush(keys.bell(queue), 1)

    @property
    def ordered(self) -> bool:
        """True while a claim is on its way whose answer will be taken."""
        return self._order is not None and self.store.current(self._order)

    @property
    def _overdue(self) -> bool:
        """True when the answer to the claim should have come: its connection has gone silent, perhaps."""
        if not self.ordered or not self.brpop_timeout or not self._in_poll:
            return False
        waited = stock.monotonic() - self._brpop_sent_at
        return waited > self.brpop_timeout + OVERDUE_S and not stock._socket_readable(self._in_poll._sock)

    def withdraw(self) -> None:
        """Let the claim that is on its way, if one is, take nothing; what it took goes back."""
        if self.sink is not None and self._order is not None and (self.ordered or self.store.unsure):
            self.store.doubt()
            with suppress(RedisError, OSError, WorkerRunning):  # the next claim, or the end, sees to it
                self._reconcile(self.sink)

    def _reconcile(self, sink: Sink) -> None:
        delivered = {seq for tag in self.qos._delivered if (seq := seq_of(tag)) is not None}
        self.store.reconcile(sink.held() | delivered)

    def look(self) -> None:
        """Look into the lists once, for producers that do not ring."""
        if self._overdue:
            self.withdraw()
        if not self.listening or not self.store.waits():
            return
        if self.ordered:
            self._silent_at = stock.monotonic()
            self._end_wait()
        else:
            self.claim()

    def _end_wait(self) -> None:
        """Let the claim that stands run now. Where Redis allows no more, ring; another worker may hear it."""
        waiting, client_id = self._waiting
        if client_id is None or not self.store.end_wait(client_id):
            self._waiting = waiting, None
            with suppress(OutOfMemoryError):  # found when the wait is over
                self.store.ring()

    def again(self) -> None:
        """Claim when a batch has ended, unless a claim waits for a bell and bells have rung of late."""
        if self.silent:
            self.look()
        else:
            self.claim()

    @property
    def silent(self) -> bool:
        """True when of late there were tasks that nobody had rung for."""
        return bool(stock.monotonic() - self._silent_at < SILENT_S)

    @property
    def fresh(self) -> bool:
        """True when a claim has just looked into all lists, and nobody was silent of late."""
        return bool(stock.monotonic() - self._claimed_at < FRESH_S) and not self.silent

    @property
    def listening(self) -> bool:
        """True when there are task queues to claim from, and room for a task."""
        return not self.closed and bool(self.served) and self._room()[0] > 0

    def claim(self) -> int:
        """Claim what there is room for and hand it on; return how many tasks came."""
        if self.ordered:
            return 0
        served, (room, better_than) = self.served, self._room()
        if self.closed or not served or room <= 0:
            return 0
        store = self.store
        store.serve(served)
        try:
            if self.sink is not None and store.unsure:
                self._reconcile(self.sink)
            idle = self.sink is not None and self.sink.idle
            tasks = store.claim(room, better_than=better_than, begin=idle)
        except WorkerRunning as exc:
            if self.sink is None:
                raise
            self.sink.fenced(exc)
            return 0
        if tasks and self.sink is not None:
            self.sink.receive(self, tasks)
        else:
            for task in tasks:
                self.deliver(task)
        return len(tasks)

    def deliver(self, task: Claimed) -> None:
        """Hand one claimed task on as a kombu message, to Celery's ordinary strategy."""
        queue, _ = keys.split_list_key(task.list_key)
        try:
            message = loads(task.payload)
            message["properties"]["delivery_tag"] = f"{TAG}{task.seq}"
            if message.get("gpuinfer"):
                message["headers"]["redelivered"] = True
        except (ValueError, TypeError, KeyError) as exc:
            self.store.bury(task.seq, task.list_key, task.payload, DeadLettered(f"cannot be decoded: {exc}"))
            return
        self._raw[f"{TAG}{task.seq}"] = task
        self.connection._deliver(message, queue)

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
        """Look into the lists, for producers that do not ring."""
        for channel in list(self.channels):
            if not channel.fresh:
                channel.look()


def register() -> None:
    """Make ``gpuinfer://`` known to kombu."""
    TRANSPORT_ALIASES["gpuinfer"] = f"{__name__}:Transport"
