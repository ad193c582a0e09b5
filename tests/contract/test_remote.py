# SPDX-License-Identifier: Apache-2.0
"""Celery's revoke and terminate: what runs goes on unless it is terminated, and its end is always written."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state

from gpuinfer import Client
from gpuinfer.client.tasks import result_key
from gpuinfer.errors import TaskFailed
from gpuinfer.queue import results
from gpuinfer.queue.claims import Final
from gpuinfer.queue.store import Store
from gpuinfer.settings import Settings
from gpuinfer.worker import remote
from tests.contract.conftest import begin, on

pytestmark = [pytest.mark.integration, on("redis-socket")]


class Worker:
    """What a command finds in a worker."""

    def __init__(self, store: Store) -> None:
        self.store = store
        #: The ids of tasks on its device whose results it drops.
        self.dropped: set[str] = set()
        controller = SimpleNamespace(gpuinfer=SimpleNamespace(batcher=self))
        self.consumer = SimpleNamespace(controller=controller)
        self.app = SimpleNamespace(gpuinfer_settings=Settings)

    def cancelled(self, ids: Iterable[str]) -> None:
        self.dropped |= set(ids)


@pytest.fixture
def worker(store: Store, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(state, "revoked", set[str]())
    return Worker(store)


def test_what_runs_or_has_failed_may_be_sent_again(store: Store, client: Client, worker: Any) -> None:
    """No worker keeps the id of a task that a revoke has left alone; that of one which waited is kept."""
    running, waiting = client.submit([1]), client.submit([2])
    task = store.claim(1)[0]
    begin(store, [task])
    said = remote.revoke(worker, [running, waiting])
    assert state.revoked == {waiting}
    assert [client.status(one).state for one in (running, waiting)] == ["running", "revoked"]
    assert f"tasks {running} not revoked" in said["ok"]
    meta = results.failure(running, TaskFailed("no"), worker="w")
    store.settle([Final(task.seq, running, meta)])
    remote.revoke(worker, [running, waiting], terminate=True)
    assert state.revoked == {waiting}
    assert client.status(running).state == "failed"


def test_a_result_is_dropped_only_where_an_end_is_written(store: Store, client: Client, worker: Any) -> None:
    """A running task whose state is gone is not ended by a terminate: its worker writes its end."""
    gone, there = client.submit([1]), client.submit([2])
    begin(store, store.claim(2))
    store.client.delete(result_key(gone))
    remote.revoke(worker, [gone, there], terminate=True)
    assert client.status(there).state == "revoked"
    assert worker.dropped == {there}
    remote.terminate(worker, "SIGTERM", there)  # as another worker hears it, later
    assert worker.dropped == {there}
