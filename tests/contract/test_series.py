# SPDX-License-Identifier: Apache-2.0
"""Series of numbers in Redis: what was written is read, in its steps, and takes no more than its room."""

from __future__ import annotations

import pytest
import redis

from gpuinfer.queue import keys, series
from gpuinfer.queue.series import COARSE, FINE, MOST
from gpuinfer.queue.store import Store
from tests.contract.conftest import on

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-socket")]

#: A moment in the middle of nowhere, 100 s before a chunk of FINE ends.
NOW = 1_800_000_000 // FINE.chunk_s * FINE.chunk_s - 100


@pytest.fixture
def client(store: Store) -> redis.Redis:
    return store.client


def test_what_was_written_is_read(client: redis.Redis) -> None:
    """Over the border of two chunks; a gap is None; the last step is the one that is not over."""
    for second in range(0, 200, 10):
        if second not in (40, 50, 60):
            series.write(client, FINE, NOW + second, {"waiting": second, "rate": second / 1000})
    found = series.read_at(client, ["waiting", "rate", "none"], NOW + 199, 200)
    assert (found.start, found.step_s) == (NOW, 10)
    expected = [None if second in (40, 50, 60) else second for second in range(0, 200, 10)]
    assert [None if v is None else round(v) for v in found.values["waiting"]] == expected
    assert found.values["rate"][19] == pytest.approx(0.19, rel=0.002)
    assert found.values["none"] == (None,) * 20


def test_steps_are_means_of_what_there_is(client: redis.Redis) -> None:
    """A step that is no multiple of what is kept is rounded up."""
    begin = NOW // 60 * 60
    for second in range(0, 120, 10):
        if second != 0:
            series.write(client, FINE, begin + second, {"waiting": second})
    found = series.read_at(client, ["waiting"], begin + 119, 120, 55)
    assert (found.start, found.step_s) == (begin, 60)
    assert found.values["waiting"] == pytest.approx((30, 85), rel=0.002)


def test_longer_ago_it_is_five_minutes(client: redis.Redis) -> None:
    """Thirty days of means, whatever is asked for beyond."""
    series.write(client, COARSE, NOW - 20 * 86400, {"waiting": 7})
    found = series.read_at(client, ["waiting"], NOW, 60 * 86400)
    assert found.step_s == 300
    assert len(found.values["waiting"]) == 30 * 86400 // 300
    assert [value for value in found.values["waiting"] if value is not None] == [7]


def test_there_are_as_many_as_may_be(client: redis.Redis) -> None:
    """What is beyond is left out, until the name of another one is void."""
    assert series.write(client, FINE, NOW, {f"s{n}": n for n in range(MOST + 3)}) == 3
    assert series.write(client, FINE, NOW + 10, {"s0": 1, "new": 2}) == 1
    assert len(series.names(client)) == MOST
    series.forget(client, NOW + COARSE.kept_s + 5)
    assert list(series.names(client)) == ["s0"]
    assert series.write(client, FINE, NOW + 20, {"new": 2}) == 0


def test_all_of_it_fits(client: redis.Redis) -> None:
    """200 series with long names, all chunks there are at any time: 16 MiB at most."""
    before = client.info("memory")["used_memory"]
    values = {f"waiting realtime {'m' * 50}{n}": 1e6 for n in range(MOST)}
    for grid in (FINE, COARSE):
        for chunk in range(grid.kept_s // grid.chunk_s + 2):
            series.write(client, grid, NOW + chunk * grid.chunk_s, values)
    assert client.info("memory")["used_memory"] - before < 16 * 2**20
    chunk = next(client.scan_iter(f"{keys.SERIES_PREFIX}10:*"))
    assert 0 < client.ttl(chunk) <= FINE.kept_s + FINE.chunk_s
