# SPDX-License-Identifier: Apache-2.0
"""A worker's channel without a worker: for tests of the claim that waits in Redis."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kombu import Connection, Queue

from gpuinfer.errors import TakenBack, UnusableRedis, WorkerRunning
from gpuinfer.queue import transport
from gpuinfer.queue.claims import Claimed, State, Wants
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import decode
from gpuinfer.queue.sink import Sink, TaskChannel
from gpuinfer.queue.store import Store
from gpuinfer.queue.transport import Channel
from gpuinfer.settings import QUEUES, Settings

NAME = "gpu0@here"


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


def turn(channel: Channel, timeout: float = 0.05) -> None:
    """Do what the event loop does once: send what is to be sent, and read what has come."""
    with suppress(TimeoutError):
        channel.connection.client.drain_events(timeout=timeout)


def stand(channel: Channel) -> None:
    """Send wait and claim, and see that they stand."""
    turn(channel)
    assert channel.ordered


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
