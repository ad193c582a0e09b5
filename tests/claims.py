# SPDX-License-Identifier: Apache-2.0
"""A worker's channel without a worker: for tests of the claim that waits in Redis."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kombu import Connection, Queue

from gpuinfer.errors import TakenBack, UnusableRedis, WorkerRunning
from gpuinfer.queue import keys, scripts, transport
from gpuinfer.queue.claims import Claimed, State, Wants
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import decode
from gpuinfer.queue.sink import Sink, TaskChannel
from gpuinfer.queue.store import Store
from gpuinfer.queue.transport import Channel
from gpuinfer.settings import QUEUES, Settings
from tests.workers import wait_until

NAME = "gpu0@here"
#: Seconds of a wait that something ends, and not its time: ``channel.brpop_timeout``.
LONG_S = 600.0


class Taker:
    """The batcher's part: keeps what it is given."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.space = 10
        self.state: State = "idle"
        self.tasks: list[Claimed] = []
        self.end: WorkerRunning | TakenBack | UnusableRedis | None = None

    def wants(self) -> Wants:
        return self.store.wants(self.space) if self.space else {}

    def receive(self, channel: TaskChannel, tasks: Sequence[Claimed]) -> None:
        self.tasks += tasks

    def held(self) -> set[int]:
        return {task.seq for task in self.tasks}

    def fenced(self, error: WorkerRunning | TakenBack | UnusableRedis) -> None:
        self.end = error

    @property
    def ids(self) -> list[str]:
        return [decode(task.payload).id for task in self.tasks]


def store_of(settings: Settings) -> Store:
    """Return the store of this worker, which serves the default model."""
    made = Store(connect(settings.broker, retries=0), NAME, QUEUES, settings.queue, models=("digits",))
    made.register(default="digits")
    return made


@contextmanager
def consuming(path: Path, taker: Sink, settings: Settings) -> Iterator[Channel]:
    """Make a worker's channel on all queues; its first claim, which begins the epoch, has been made."""
    transport.register()
    options = {"worker": NAME, "queue_settings": settings.queue.model_dump()}
    with Connection(f"gpuinfer+socket://{path}", transport_options=options) as connection:
        made: Channel = connection.default_channel
        made.sink = taker
        queues = [Queue(name, routing_key=name) for name in QUEUES]
        with connection.Consumer(queues, channel=made, callbacks=[lambda *_: None]):
            made.claim()
            yield made
            if made._in_poll:  # its end is waited for as the channel is closed
                made.store.client.lpush(keys.wake(made.store.worker), 1)


def turn(channel: Channel, timeout: float = 0.05) -> None:
    """Do what the event loop does once: send what is to be sent, and read what has come."""
    with suppress(TimeoutError):
        channel.connection.client.drain_events(timeout=timeout)


def until(channel: Channel, condition: Callable[[], object]) -> None:
    """Do what the event loop does until the condition holds."""

    def holds() -> object:
        turn(channel)
        return condition()

    wait_until(holds)


def stand(channel: Channel) -> None:
    """Send wait and claim, and see that they stand, also in Redis."""
    wait, info = channel._wait, channel.store.client.info
    until(
        channel,
        lambda: (
            channel.ordered
            and wait._timeout_s == channel.brpop_timeout
            and info("clients")["blocked_clients"] == 1
        ),
    )


@contextmanager
def unhurried() -> Iterator[None]:
    """Let a worker that waits count as idle, and a producer as silent, for however long the machine stands
    still: in the scripts of all that is made meanwhile.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scripts._CONSTANTS, "IDLE_VOID", LONG_S)
        patch.setattr(transport, "SILENT_S", LONG_S)
        scripts.source.cache_clear()
        yield
    scripts.source.cache_clear()


def taken(taker: Taker) -> int:
    """Count what this worker has in flight."""
    return int(taker.store.client.hlen(taker.store.inflight)) // 2


class Wire:
    """A way to Redis that can go silent: what is on it arrives nowhere, and it stays open."""

    def __init__(self, path: Path, server: Path) -> None:
        self.path, self._server, self._cut = path, server, threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Bring no answer from now on, on the connections there are."""
        self._cut.set()

    def close(self) -> None:
        """Close all connections."""
        for end in (self._listener, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, far = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(str(self._server))
                self._ends += [near, far]
                if self._cut.is_set():
                    self._cut = threading.Event()
                for one, other, deaf in ((near, far, None), (far, near, self._cut)):
                    threading.Thread(target=self._carry, args=(one, other, deaf), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket, deaf: threading.Event | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if deaf is None or not deaf.is_set():
                    sink.sendall(data)
