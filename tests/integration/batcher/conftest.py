# SPDX-License-Identifier: Apache-2.0
"""A batcher with a small model, driven by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuinfer.errors import GpuinferError
from gpuinfer.models.loader import load
from gpuinfer.models.repository import Repository
from gpuinfer.queue.connection import connect
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.worker.batcher import Batcher
from gpuinfer.worker.celery_state import CeleryState
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import Engine
from gpuinfer.worker.sizes import Sizes
from tests.batchers import Line
from tests.models_for_tests import picky
from tests.services import RedisServer
from tests.unit.test_engine import Small


@pytest.fixture
def model(tmp_path: Path) -> Small:
    picky(tmp_path / "picky")
    return Small(load(Repository([tmp_path]).get("picky"), "cpu"), device="cuda:0")


@pytest.fixture
def lost() -> list[GpuinferError]:
    return []


@pytest.fixture
def settings(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(redis_server, queue={"retry_backoff_s": 0.05, "max_retries": 2})


@pytest.fixture
def batcher(settings: Settings, model: Small, lost: list[GpuinferError]) -> Iterator[Batcher]:
    client = connect(settings.broker, retries=0)
    store = Store(client, "gpu0@here", QUEUES, settings.queue, models=("picky",))
    store.register(default="picky")
    deadline = Deadline(lambda: None)
    engine = Engine({"picky": model}, Sizes({"picky": 64}), deadline, lambda: None)  # type: ignore[dict-item]
    made = Batcher(
        store, engine, {"picky": model.manifest}, settings, "cpu", CeleryState("gpu0@here"), lost.append
    )
    made.channel = Line(made)  # type: ignore[assignment]  # all of a channel that is used
    yield made
    engine.close()
    deadline.close()
