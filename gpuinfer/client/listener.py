# SPDX-License-Identifier: Apache-2.0
"""Subscriptions to result channels, which are reused by later waits.

redis-py's PubSub costs 30 us per event. This one has no pattern subscriptions and does not reconnect: when
the connection is lost, the caller starts its wait again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import redis

from gpuinfer.queue.connection import AWAY

#: One SUBSCRIBE names at most this many channels.
CHUNK = 1000
#: Maximum channels that stay subscribed after a wait. Each has already published its only message.
KEPT = 8
#: Maximum idle subscriptions that a client keeps.
MAX_IDLE_LISTENERS = 8
#: After this many seconds of silence send PING; after this many the connection counts as lost.
ASK_AFTER_S, LOST_AFTER_S = 15.0, 25.0

#: A channel and a published message; None: all subscriptions are active, so check the result keys once.
Event = tuple[str, bytes | None]


class Listener:
    """One connection. Not thread-safe."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._pid = os.getpid()
        self._connection: Any = pool.get_connection()
        if hasattr(self._connection._parser, "set_pubsub_push_handler"):  # RESP3; the default handler logs
            self._connection._parser.set_pubsub_push_handler(lambda event: event)
        self._channels: list[str] = []
        self._unconfirmed = 0
        #: True if all channels were subscribed already and ``next`` has not reported it yet.
        self._report_active = False
        self._heard_at = time.monotonic()
        self._asked = False
        #: When it was last read, while channels stay subscribed between waits; inf: none do.
        self.unread_since = math.inf

    @property
    def alive(self) -> bool:
        """Whether the connection is open and belongs to this process (not to a fork's parent)."""
        try:
            self._connection.can_read()
        except (redis.ConnectionError, redis.TimeoutError, OSError):
            return False
        return self._pid == os.getpid()

    def subscribe(self, channels: Sequence[str]) -> None:
        """Listen to exactly these channels. An event without data reports that they are subscribed."""
        stale = set(self._channels) - set(channels)
        new = sorted(set(channels) - set(self._channels))
        self._channels = list(channels)
        if stale or new:
            self.unread_since = math.inf
        self._heard_at, self._asked = time.monotonic(), False
        commands = [("SUBSCRIBE", *new[at : at + CHUNK]) for at in range(0, len(new), CHUNK)]
        self._send([("UNSUBSCRIBE", *stale), *commands] if stale else commands)
        self._report_active = not self._unconfirmed

    def _send(self, commands: Sequence[Sequence[str]]) -> None:
        self._unconfirmed += sum(len(command) - 1 for command in commands)
        if not commands:
            return
        packed = [self._connection.pack_command(*command) for command in commands]
        self._connection.send_packed_command([b"".join(chain) for chain in packed], check_health=False)

    def next(self, timeout_s: float) -> Event | None:
        """Return the next event, or None at the timeout. Raises redis-py's errors."""
        if self._report_active:
            self._report_active = False
            return "", None
        until = time.monotonic() + timeout_s
        while True:
            try:
                event = self._connection.read_response(
                    timeout=timeout_s, push_request=True, disconnect_on_error=False
                )
            except redis.TimeoutError:
                self._ask()
                return None
            self._heard_at, self._asked = time.monotonic(), False
            kind = event[0] if isinstance(event, list) else b"pong"
            if kind == b"message":
                return event[1].decode(), event[2]
            if kind in (b"subscribe", b"unsubscribe"):
                self._unconfirmed -= 1
                if not self._unconfirmed:
                    return "", None
            timeout_s = max(0.0, until - self._heard_at)

    def _ask(self) -> None:
        """Send PING on a silent connection. Raises ConnectionError if Redis does not answer."""
        silent_s = time.monotonic() - self._heard_at
        if silent_s > LOST_AFTER_S:
            raise redis.ConnectionError(f"Redis was silent for {silent_s:.0f} s and did not answer PING")
        if silent_s > ASK_AFTER_S and not self._asked:
            self._asked = True
            self._send([("PING",)])

    def leave(self, *, ended: bool) -> None:
        """End a wait. If its tasks have ``ended``, a few channels are kept until the next ``subscribe``."""
        if self._channels and not (ended and len(self._channels) <= KEPT):
            self._send([("UNSUBSCRIBE", *self._channels)])
            self._channels = []
        self.unread_since = time.monotonic()

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()
        self._pool.release(self._connection)


class Listeners:
    """A client's idle subscriptions: connecting for each wait would be most of its cost."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._idle: list[Listener] = []

    def close(self) -> None:
        """Close the idle subscriptions. Another wait opens a new one."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def lend(self, waiting: Sized) -> Iterator[Listener]:
        """Lend a subscription to a wait; it is kept for the next unless an exception passed through it.

        ``waiting``: what the wait is for, empty once all of it has ended.
        """
        listener = self._take()
        try:
            yield listener
        except GeneratorExit:
            self._keep(listener, waiting)  # the caller has its result
            raise
        except BaseException:
            listener.close()
            raise
        self._keep(listener, waiting)

    def _take(self) -> Listener:
        try:
            listener = self._idle.pop()
        except IndexError:
            return Listener(self._pool)
        if listener.alive:
            return listener
        listener.close()
        return Listener(self._pool)

    def _keep(self, listener: Listener, waiting: Sized) -> None:
        if len(self._idle) >= MAX_IDLE_LISTENERS:
            listener.close()
            return
        try:
            listener.leave(ended=not waiting)
        except (*AWAY, redis.RedisError):
            listener.close()
        else:
            self._idle.append(listener)
