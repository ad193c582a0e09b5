# SPDX-License-Identifier: Apache-2.0
"""Celery's consumer, in which the batcher receives the tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from celery import bootsteps
from celery.platforms import EX_FAILURE
from celery.worker import consumer as stock
from celery.worker import state
from celery.worker.consumer.control import Control
from celery.worker.pidbox import Pidbox
from celery.worker.state import maybe_shutdown
from redis.exceptions import ResponseError

from gpuinfer.errors import TakenBack, UnusableRedis, WorkerRunning
from gpuinfer.log import get_logger
from gpuinfer.queue.connection import refuses
from gpuinfer.queue.heartbeats import wait_for_namesake
from gpuinfer.worker import remote
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.ceiling import EX_GROWN
from gpuinfer.worker.heartbeat import BEAT_S, Pulse
from gpuinfer.worker.process import Process

log = get_logger(__name__)

#: Seconds between attempts to reach Redis: at first, and at most.
RETRY_START_S, RETRY_MAX_S = 0.2, 2.0
#: Interval of the batcher's timer in seconds. Each wake-up of an idle worker takes about 0.4 ms.
TICK_S = 0.2
#: Seconds between updates of Celery's tables for its heartbeat, which has the number of running tasks.
SHOW_S = 1.0
#: A key that does not exist: EXPIRE on it is a write without effect.
PROBE = "gpuinfer:probe"
#: Maximum seconds to close a broken connection.
COLLECT_TIMEOUT_S = 1.0
#: Celery steps not needed here: exchange of revoked ids and of events between workers.
_BY_ITSELF = {"without_mingle": True, "without_gossip": True}


class Batching(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is not annotated
    """Attaches the batcher to each new connection and drains it when the worker stops."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.process: Process = consumer.controller.gpuinfer
        self.batcher: Batcher = self.process.batcher
        self._restored = False

    def start(self, consumer: Any) -> None:
        if self._restored:
            self.batcher.store.mark_uncertain()  # tasks on Celery's own path have no owner now
        else:
            self._restore()
        channel = consumer.task_consumer.channel
        channel.sink = self.batcher
        self.batcher.attach(channel, consumer.event_dispatcher)
        self.batcher.engine.wake = lambda: consumer.hub.call_soon(self.batcher.collect)
        self.batcher.engine.probed = lambda: consumer.hub.call_soon(self.batcher.tick)
        consumer.timer.call_repeatedly(TICK_S, self.batcher.tick)
        consumer.timer.call_repeatedly(BEAT_S, self.process.pulse.beat)
        consumer.timer.call_repeatedly(SHOW_S, self.batcher.show)
        if self.process.ceiling.limit_mb:
            consumer.timer.call_repeatedly(BEAT_S, self._keep_below)

    def _keep_below(self) -> None:
        """Stop as on SIGTERM if the process exceeds its memory limit; systemd restarts it."""
        if state.should_stop is None and self.process.ceiling.passed():
            state.should_stop = EX_GROWN

    def _restore(self) -> None:
        """Return tasks left in flight by the previous process of this name. Exit if another one still
        runs."""
        process, store = self.process, self.batcher.store
        try:
            wait_for_namesake(store.client, store.worker, process.domain, pause=self._pause)
            with suppress(TakenBack):  # by a reaper, at the same moment
                store.restore()
        except WorkerRunning as exc:
            self.batcher.end(exc)
        self._restored = True

    def _pause(self, seconds: float) -> None:
        self.process.pulse.beat()
        maybe_shutdown()
        time.sleep(seconds)

    def stop(self, consumer: Any) -> None:
        if consumer.blueprint.state == bootsteps.RUN:  # a reconnection, not the end
            self.batcher.detach()
        else:
            self.process.drain(crashed=consumer.controller.exitcode == EX_FAILURE)


class Mailbox(Pidbox):  # type: ignore[misc]  # celery is not annotated
    """Receives control commands, which read Celery's tables."""

    def on_message(self, body: Any, message: Any) -> None:
        self.c.controller.gpuinfer.batcher.show()
        super().on_message(body, message)


class Remote(Control):  # type: ignore[misc]  # celery is not annotated
    """Celery's remote control, with gpuinfer's mailbox and revoke."""

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        remote.register()
        self.box = Mailbox(consumer)
        self.start, self.stop, self.shutdown = self.box.start, self.box.stop, self.box.shutdown


class Consumer(stock.Consumer):  # type: ignore[misc]  # celery is not annotated
    """Reconnects soon after Redis is back; logs once that Redis is unavailable, and once that it is back."""

    away = False

    class Blueprint(stock.Consumer.Blueprint):  # type: ignore[misc]  # celery is not annotated
        default_steps = (
            *(step for step in stock.Consumer.Blueprint.default_steps if not step.endswith(":Control")),
            Remote,
            Batching,
        )

    def __init__(self, *args: Any, worker_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Ignore other workers: only an administrator may query them, and the queue is in Redis."""
        super().__init__(*args, worker_options=dict(worker_options or {}) | _BY_ITSELF, **kwargs)

    @property
    def pulse(self) -> Pulse:
        """The process's heartbeat, which reports that the worker waits for Redis."""
        pulse: Pulse = self.controller.gpuinfer.pulse
        return pulse

    def start(self) -> None:
        """Run until the worker stops. If Redis has another format, exit at once without writing."""
        try:
            super().start()
        except UnusableRedis as exc:
            self.controller.gpuinfer.batcher.end(exc)

    def _wait(self) -> None:
        self.pulse.beat()
        maybe_shutdown()

    def _lost(self, exc: Exception) -> None:
        self.pulse.lost()
        if not self.away:
            action = "redis_refuses" if refuses(exc) else "redis_away"
            log.error(action, reason=str(exc), hint="trying again every second or two")
        self.away = True

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._lost(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self._lost(exc)
        with suppress(Exception):  # as Celery does: the connection is broken anyway
            self.connection.collect(socket_timeout=COLLECT_TIMEOUT_S)

    def ensure_connected(self, conn: Any) -> Any:
        while True:
            connected = conn.ensure_connection(
                lambda exc, _: self._lost(exc),
                None,
                RETRY_START_S,
                RETRY_START_S,
                RETRY_MAX_S,
                callback=self._wait,
            )
            try:
                connected.default_channel.client.expire(PROBE, 1)
                break
            except ResponseError as exc:  # a replica or a full disk: no writes possible
                self._lost(exc)
                time.sleep(RETRY_MAX_S)
                self._wait()
        self.first_connection_attempt = False
        if self.away:
            log.info("redis_back")
        self.away = False
        self.pulse.found()
        return connected
