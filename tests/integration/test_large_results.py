# SPDX-License-Identifier: Apache-2.0
"""Results that are too large: their task fails and says so, and nobody else is the worse for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuinfer import Client
from gpuinfer.errors import ResultTooLarge
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.worker.outbox import Outbox
from tests.conftest import RedisFactory
from tests.models_for_tests import write_model
from tests.workers import NAME, Workers

pytestmark = pytest.mark.integration


class _Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.1).repeat(1, 200_000)


class _Row(nn.Module):
    """The first input says how wide all answers of the batch are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(x.size(0), int(x.max()))


TABLES = """
max_batch_size = 4
[[inputs]]
name = "x"
shape = [1]
[[outputs]]
name = "y"
"""


def test_larger_than_redis_takes(
    redis_factory: RedisFactory, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    """Redis closes the connection for it: that task fails, those before, beside and behind it do not."""
    server = redis_factory(proto_max_bulk_len="1mb")
    write_model(tmp_path / "models" / "wide", _Wide(), TABLES)
    write_model(tmp_path / "models" / "row", _Row(), TABLES)
    workers = Workers(server, tmp_path)
    try:
        with Client(settings_for(server)) as client:
            wide = client.submit([0.0], model="wide", encoding="list")
            before = [client.submit([2.0], model="row") for _ in range(3)]
            worker = workers.start(worker_models="wide,row")
            with pytest.raises(ResultTooLarge, match=r"has \d{7} bytes.*lower queue.max_result_bytes"):
                client.result(wide, timeout_s=120)
            job = client.submit_batch([[20_000.0]] * 4, model="row")  # large, and taken
            behind = client.submit([3.0], model="row")
            assert client.result(behind, timeout_s=120)
            assert len(client.result(job, timeout_s=120)) == 4
            assert all(client.results(before, timeout_s=120))
        assert not server.client().exists(keys.inflight(NAME))
        assert worker.terminate() == 0
    finally:
        workers.close()


def test_the_culprit_is_found(redis_factory: RedisFactory, settings_for: Callable[..., Settings]) -> None:
    """Of a batch of small and large results the one that Redis does not take fails, alone; twice."""
    server = redis_factory(proto_max_bulk_len="1mb")
    settings = settings_for(server)
    store = Store(connect(settings.broker, retries=0), NAME, QUEUES, settings.queue, models=("digits",))
    store.register(default="digits")
    outbox = Outbox(store)
    with Client(settings) as client:
        tasks = client.submit_many([[1]] * 20)
        finals = []
        for n, claimed in enumerate(store.claim(20)):
            envelope = decode(claimed.payload)
            size = {7: 2_000_000, 11: 1_500_000}.get(n, 100_000 * (n % 3))
            finals.append(outbox.final(claimed, "x" * size, envelope))
        outbox.settle(finals, idle=True)
        states = [client.status(task) for task in tasks]
    assert [n for n, status in enumerate(states) if status.state != "completed"] == [7, 11]
    assert isinstance(states[7].error, ResultTooLarge)
    assert not outbox.unsettled
    assert not server.client().exists(keys.inflight(NAME))
    raw: Any = server.client()
    assert raw.hget(keys.ENDED, "failed realtime digits") == b"2"


def test_larger_than_is_set(
    redis_factory: RedisFactory, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    """It fails as soon as it is known how large it is, by the words of the setting; a neighbour does not."""
    server = redis_factory()
    write_model(tmp_path / "models" / "row", _Row(), TABLES)
    workers = Workers(server, tmp_path)
    try:
        with Client(settings_for(server)) as client:
            job = client.submit_batch([[5_000.0]] * 4, model="row")
            small = client.submit([2.0], model="row")
            worker = workers.start(worker_models="row", queue_max_result_bytes=50_000)
            with pytest.raises(ResultTooLarge, match=r"has \d+ bytes; queue.max_result_bytes is 50000"):
                client.result(job, timeout_s=120)
            assert client.result(small, timeout_s=120)
            worker.wait_for_line(f'"task_failed".*{job}.*result_too_large')
    finally:
        workers.close()
