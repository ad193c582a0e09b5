# SPDX-License-Identifier: Apache-2.0
"""Returns tasks that a stopped worker left in flight; run by hand or by systemd."""

from __future__ import annotations

import socket
import time

import redis

from gpuinfer.errors import WorkerRunning
from gpuinfer.locks import domain, stopped
from gpuinfer.queue.claims import Restored
from gpuinfer.queue.connection import connect, typed_errors, user_of
from gpuinfer.queue.epoch import REAPER
from gpuinfer.queue.heartbeats import wait_for_namesake
from gpuinfer.queue.orphans import ago, holder
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings


def put_back(settings: Settings, worker: str, *, force: bool = False) -> Restored:
    """Return tasks in flight at ``worker`` (``gpu0@host``) to their queues.

    Raises WorkerRunning if it runs on this host or, without ``force``, may run on another one;
    BrokerUnavailable, ConfigError.
    """
    host = socket.gethostname()
    with typed_errors(user_of(settings.broker)), connect(settings.broker) as client:
        by = f"{REAPER} gpuinfer restore@{host}"
        store = Store(client, worker, settings.worker.queues, settings.queue, by=by)
        if worker.partition("@")[2] == host:
            return _of_this_host(client, store, settings, force=force)
        if not force:
            _refuse_if_it_may_run(client, worker, settings.watcher.reap_after_s)
        return store.restore()


def _of_this_host(client: redis.Redis, store: Store, settings: Settings, *, force: bool) -> Restored:
    """Restore with the lock held, so that the worker cannot start meanwhile."""
    run_dir = settings.worker.run_dir
    with stopped(run_dir, store.worker):
        if not force:  # another host or container with this name may still run its tasks
            wait_for_namesake(client, store.worker, domain(run_dir), pause=time.sleep)
        return store.restore()


def _refuse_if_it_may_run(client: redis.Redis, worker: str, reap_after_s: float) -> None:
    found = holder(client, worker)
    if not found.seen_at:
        return
    seen = f"{worker} was seen {ago(found.silent_s)} ago"
    if not found.silent:
        raise WorkerRunning(f"{seen} and is running; stop it there, or take away its tasks with --force")
    if found.silent_s < reap_after_s:
        raise WorkerRunning(
            f"{seen} and may come back; a watcher returns its tasks after {ago(reap_after_s)}, "
            "--force does so at once"
        )
