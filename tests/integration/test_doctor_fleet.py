# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of the default model, and which one it tries, on a real Redis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from gpuinfer.doctor import fleet, work
from gpuinfer.doctor.host import Host, Skipped, error, ok, warning
from gpuinfer.models.repository import Repository
from gpuinfer.queue import catalogue, keys
from gpuinfer.settings import Loaded, Settings
from tests.apis import HandWorker
from tests.services import RedisServer

pytestmark = pytest.mark.integration


@pytest.fixture
def host(redis_server: RedisServer, settings_for: Callable[..., Settings], tmp_path: Path) -> Host:
    """A host without systemd, on this test's Redis."""
    return Host(Loaded(settings_for(redis_server), {}), root=tmp_path)


def test_the_default_model(host: Host, worker: HandWorker) -> None:
    """It is set, and the fleet knows it; where not, a command says which could be."""
    assert fleet.default_model(host) == ok(
        "the fleet knows no model yet; the first worker sets the default model"
    )
    worker.register()
    assert fleet.default_model(host) == ok("the default model is digits, of 1 that the fleet knows")
    connection: redis.Redis = worker.store.client
    catalogue.set_default(connection, "gone", force=True)
    assert fleet.default_model(host) == error(
        "the default model is gone, and must be one of digits: requests that name no model are refused",
        "gpuinfer model default digits",
    )
    connection.delete(keys.DEFAULT_MODEL)
    assert fleet.default_model(host) == warning(
        "the default model is not set, and must be one of digits: requests that name no model are refused",
        "gpuinfer model default digits",
    )


def test_which_model_is_tried(worker: HandWorker, redis_server: RedisServer) -> None:
    """One that a live worker serves and that is installed here; the default one, if it may be."""
    with redis_server.client() as connection:
        other = HandWorker(connection, "digits-photo", "elsewhere", "digits")
        other.beat()
        found = catalogue.read(connection)
        assert work.choose(found, Repository([])).manifest.name == "digits-photo"
        catalogue.set_default(connection, "elsewhere")
        assert work.choose(catalogue.read(connection), Repository([])).manifest.name == "digits"
        connection.delete(keys.heartbeat(other.store.worker))
        with pytest.raises(Skipped, match="no live worker serves a model of this host"):
            work.choose(catalogue.read(connection), Repository([]))
    assert worker.store.worker == other.store.worker
