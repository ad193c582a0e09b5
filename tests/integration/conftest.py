# SPDX-License-Identifier: Apache-2.0
"""Fixtures of tests that run real workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuinfer import Client
from gpuinfer.settings import Settings
from tests.apis import Api, HandWorker
from tests.services import RedisServer
from tests.workers import Workers


@pytest.fixture
def workers(redis_server: RedisServer, tmp_path: Path) -> Iterator[Workers]:
    """Start workers on this test's Redis."""
    started = Workers(redis_server, tmp_path)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture
def client(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Iterator[Client]:
    """A client on this test's Redis."""
    with Client(settings_for(redis_server)) as opened:
        yield opened


@pytest.fixture
def api(redis_server: RedisServer, tmp_path: Path) -> Iterator[Api]:
    """The API on this test's Redis."""
    with Api(redis_server, tmp_path) as started:
        yield started


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[HandWorker]:
    """Somebody who ends tasks."""
    with redis_server.client() as client:
        yield HandWorker(client)
