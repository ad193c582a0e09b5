# SPDX-License-Identifier: Apache-2.0
"""The watcher one step at a time, on a real Redis: what it keeps for the next process, and for readers."""

from __future__ import annotations

import orjson
import pytest
from redis.exceptions import OutOfMemoryError
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.api.schemas import DIGIT
from gpuinfer.queue.connection import connect
from gpuinfer.queue.fleet import HOSTS
from gpuinfer.watcher import notes
from gpuinfer.watcher.main import Watcher
from gpuinfer.watcher.notes import DECISIONS, MEMORY_PREFIX
from gpuinfer.watcher.state import Key
from tests.services import RedisServer
from tests.told import Build, Told, cpu

pytestmark = pytest.mark.integration


async def test_a_new_process_remembers_what_the_last_one_did(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """Rates, holds, failures and own commands are kept in Redis; an unknown form is an empty memory."""
    settings = cpu(redis_server, settings_for)
    units = Told(2)
    first = Watcher(settings, units, (0, 1), act=True, host="a")
    with Client(settings) as client:
        client.submit(DIGIT)
    await first.step()
    second = Watcher(settings, units, (0, 1), act=True, host="a")
    await second.step()
    assert second.history is not None
    assert second.history.units[Key(0, "a")].verb == "start"
    assert not second.history.units[Key(0, "a")].hold
    with pytest.raises(notes.Unreadable, match=r"units\.0"):
        notes.unpack(b'{"units": [[1]]}')
    assert first.history is not None
    assert notes.unpack(notes.pack(first.history)).units == first.history.units


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (b"{", "it: Invalid JSON"),
        (b'{"units": [[0, "a", {"state": "asleep", "since": 0}]]}', "units.0.2"),
        (None, "WRONGTYPE"),
    ],
    ids=["garbage", "another version", "another type"],
)
async def test_memory_that_cannot_be_read_is_said_once(
    redis_server: RedisServer, settings_for: Build, kept: bytes | None, words: str
) -> None:
    """The watcher says what it has lost, goes on without it, and keeps its own from then on."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.set(MEMORY_PREFIX + "a", kept) if kept else client.sadd(MEMORY_PREFIX + "a", "x")
    with capture_logs() as logs:
        dry = Watcher(settings, Told(1), (0,), act=False, host="a")
        for _ in range(3):
            await dry.step()
        watcher = Watcher(settings, Told(1), (0,), act=True, host="a")
        for _ in range(3):
            decision = await watcher.step()
    said = [entry for entry in logs if entry["event"] == "memory_unreadable"]
    assert [words in entry["reason"] for entry in said] == [True, True]  # once each
    assert decision is not None
    assert decision.inputs
    assert notes.unpack(client.get(MEMORY_PREFIX + "a")).units  # type: ignore[arg-type]


async def test_a_full_redis_keeps_what_was_decided(redis_server: RedisServer, settings_for: Build) -> None:
    """Redis takes no new task, and the start that this asks for is known in the next life, and explained."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.lpush("realtime", *[b"x" * 1000] * 3000)
    client.config_set("maxmemory", "2mb")
    with pytest.raises(OutOfMemoryError):
        client.set("more", 1)
    units = Told(1)
    await Watcher(settings, units, (0,), act=True, host="a").step()
    assert units.done == [("start", 0)]
    second = Watcher(settings, units, (0,), act=True, host="a")
    await second.step()
    assert second.history is not None
    assert second.history.units[Key(0, "a")].verb == "start"
    kept = [orjson.loads(text) for text in client.lrange(DECISIONS, 0, -1)]
    assert [entry["verdict"] for entry in kept if entry["actions"]] == ["scale_up"]


async def test_each_host_tells_what_it_has_done_itself(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """Both plan for both; each one's entry has its own part."""
    settings = cpu(redis_server, settings_for)
    pair = [Watcher(settings, Told(1), (0,), act=True, host=host) for host in "ab"]
    for watcher in pair:
        await watcher.step()
    with Client(settings) as client:
        for _ in range(30):
            client.submit(DIGIT)
    for watcher in pair:
        await watcher.step()
    kept = [orjson.loads(text) for text in connect(settings.broker).lrange(DECISIONS, 0, -1)]
    started = {entry["host"]: [one["instance"] for one in entry["actions"]] for entry in kept[:2]}
    assert started == {"a": ["gpu0@a"], "b": ["gpu0@b"]}


async def test_no_more_decisions_are_kept_than_anybody_reads(
    redis_server: RedisServer, settings_for: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest ones, first."""
    monkeypatch.setattr(notes, "KEPT", 2)
    settings = cpu(redis_server, settings_for)
    with Client(settings) as client:
        client.submit(DIGIT)
    for host in "abc":
        await Watcher(settings, Told(1), (0,), act=True, host=host).step()
        connect(settings.broker).delete(HOSTS)
    kept = connect(settings.broker).lrange(DECISIONS, 0, -1)
    assert [orjson.loads(text)["host"] for text in kept] == ["c", "b"]
