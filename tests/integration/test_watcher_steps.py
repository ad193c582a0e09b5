# SPDX-License-Identifier: Apache-2.0
"""The watcher one step at a time, on a real Redis: what several of them tell each other and do."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.api.schemas import DIGIT
from gpuinfer.errors import FormatMismatch, UnitRefused, UnitStopping, UnitsUnavailable
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.fleet import HOSTS
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES
from gpuinfer.watcher import main
from gpuinfer.watcher import units as back_end
from gpuinfer.watcher.main import Watcher
from gpuinfer.watcher.notes import MEMORY_PREFIX
from gpuinfer.watcher.reaper import PROBE_EVERY_S
from gpuinfer.watcher.state import Key
from gpuinfer.watcher.units import UnitView
from tests.services import RedisServer
from tests.told import Build, Told, cpu

pytestmark = pytest.mark.integration


async def test_two_watchers_start_together_what_one_would(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """They know each other through Redis alone, and fill one order: numbers first, then hosts."""
    settings = cpu(redis_server, settings_for)
    units = [Told(4), Told(4)]
    pair = [
        Watcher(settings, one, (0, 1, 2, 3), act=True, host=host)
        for one, host in zip(units, "ab", strict=True)
    ]
    for watcher in pair:
        await watcher.step()
    with Client(settings) as client:
        for _ in range(12):
            client.submit(DIGIT, queue="default")
    for _ in range(3):
        for watcher in pair:
            await watcher.step()
    assert [one.done for one in units] == [[("start", 0), ("start", 1)], [("start", 0)]]


async def test_a_dry_run_beside_the_service_knows_its_commands(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """What the service starts is not taken for a start by hand, and neither takes the other's place."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    units = Told(2)
    live = Watcher(settings, units, (0, 1), act=True, host="a")
    dry = Watcher(settings, units, (0, 1), act=False, host="a")
    for watcher in (live, dry, live):
        await watcher.step()
    with Client(settings) as submitter:
        for _ in range(12):
            submitter.submit(DIGIT)
    kept = client.get(MEMORY_PREFIX + "a")
    await dry.step()
    assert client.get(MEMORY_PREFIX + "a") == kept
    await live.step()
    await dry.step()
    assert units.done == [("start", 0), ("start", 1)]
    assert dry.history is not None
    assert not any(unit.hold for unit in dry.history.units.values())
    told = orjson.loads(client.hget(HOSTS, "a") or b"")
    assert not any(one["log_only"] for one in told["instances"])
    await live.step()  # tells what it has decided at the next look
    told = orjson.loads(client.hget(HOSTS, "a") or b"")
    assert (told["desired"], told["quarantined"]) == (6, 0)  # more than there are


async def test_two_watchers_of_one_name_say_so(redis_server: RedisServer, settings_for: Build) -> None:
    """They take each other's place in the registry: both say it, once; a new life of one does not."""
    settings = cpu(redis_server, settings_for)
    await Watcher(settings, Told(1), (0,), act=True, host="a").step()
    pair = [Watcher(settings, Told(1), (0,), act=True, host="a") for _ in range(2)]
    with capture_logs() as logs:
        for watcher in pair[:1] * 3:
            await watcher.step()
        assert [entry for entry in logs if entry["event"] == "name_taken"] == []
        for watcher in pair * 3:
            await watcher.step()
    assert len([entry for entry in logs if entry["event"] == "name_taken"]) == 2


async def test_a_refused_start_is_a_failure(redis_server: RedisServer, settings_for: Build) -> None:
    """What systemd will not start cools down, and why is kept and told; the next of the order is asked."""

    class Refusing(Told):
        async def act(self, verb: str, number: int) -> None:
            if number == 0:
                raise UnitRefused("systemd refuses StartUnit: bad unit file setting")
            await super().act(verb, number)

    settings = cpu(redis_server, settings_for)
    units = Refusing(2)
    watcher = Watcher(settings, units, (0, 1), act=True, host="a")
    with Client(settings) as client:
        client.submit(DIGIT)
    for _ in range(3):
        await watcher.step()
    assert units.done == [("start", 1)]
    second = Watcher(settings, units, (0, 1), act=True, host="a")
    await second.step()
    assert second.history is not None
    unit = second.history.units[Key(0, "a")]
    assert (unit.failures, unit.why) == (1, "systemd refuses StartUnit: bad unit file setting")
    told = orjson.loads(connect(settings.broker).hget(HOSTS, "a") or b"{}")
    assert "bad unit file setting" in told["instances"][0]["excluded"]


async def test_told_to_stop_it_acts_no_more(redis_server: RedisServer, settings_for: Build) -> None:
    """In the middle of a step, too: of two starts the second is left out, and the next look notes nothing.

    The first is undone: the order to stop all workers may have come before it, and does not hold for it.
    """

    class Stopping(Told):
        async def act(self, verb: str, number: int) -> None:
            await super().act(verb, number)
            stop.set()

    class Late(Told):
        async def states(self, numbers: Collection[int] = ()) -> dict[int, UnitView]:
            stop.set()  # the workers stop together with us, and are seen to
            return self.views

    settings = cpu(redis_server, settings_for)
    with Client(settings) as client:
        for _ in range(12):
            client.submit(DIGIT)
    for units, done in ((Stopping(4), [("start", 0), ("stop", 0)]), (Late(4), [])):
        stop = asyncio.Event()
        watcher = Watcher(settings, units, (0, 1, 2, 3), act=True, host="a")
        await asyncio.wait_for(watcher.run(stop), 60)
        assert units.done == done
    assert watcher.history is None or not any(unit.hold for unit in watcher.history.units.values())


@pytest.mark.parametrize("states", ["activating deactivating inactive", "deactivating inactive", "inactive"])
async def test_a_start_that_was_undone_was_not_stopped_by_hand(
    redis_server: RedisServer, settings_for: Build, states: str
) -> None:
    """Whatever the next watcher sees of it first; it may start that worker again."""

    class Stopping(Told):
        async def act(self, verb: str, number: int) -> None:
            await super().act(verb, number)
            stop.set()

    settings, stop = cpu(redis_server, settings_for), asyncio.Event()
    with Client(settings) as client:
        client.submit(DIGIT)
    first = Stopping(1)
    await asyncio.wait_for(Watcher(settings, first, (0,), act=True, host="a").run(stop), 60)
    assert first.done == [("start", 0), ("stop", 0)]
    units = Told(1)
    second = Watcher(settings, units, (0,), act=True, host="a")
    for state in states.split():
        units.views[0] = UnitView(state=state)  # type: ignore[arg-type]  # one of those that there are
        await second.step()
    assert second.history is not None
    assert second.history.units[Key(0, "a")].hold == ""
    assert units.done == [("start", 0)]


async def test_told_to_stop_it_undoes_starts_that_may_come(
    redis_server: RedisServer, settings_for: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that systemd has not answered may still come; an older one runs on; a refused one never ran."""

    class Unsure(Told):
        def __init__(self, error: Exception | None) -> None:
            super().__init__(1)
            self.error = error

        async def act(self, verb: str, number: int) -> None:
            await super().act(verb, number)
            stop.set()
            if verb == "start" and self.error is not None:
                raise self.error

    settings = cpu(redis_server, settings_for)
    with Client(settings) as client:
        client.submit(DIGIT)
    for undo_s, error, undone in (
        (60.0, UnitsUnavailable("systemd does not answer StartUnit: timeout"), True),
        (0.0, None, False),
        (60.0, UnitStopping("systemd refuses StartUnit: transaction is destructive"), False),
        (60.0, UnitRefused("systemd refuses StartUnit: no such unit"), False),
    ):
        connect(settings.broker).delete(MEMORY_PREFIX + "a")
        monkeypatch.setattr(back_end, "UNDO_S", undo_s)
        units, stop = Unsure(error), asyncio.Event()
        await asyncio.wait_for(Watcher(settings, units, (0,), act=True, host="a").run(stop), 60)
        assert units.done == [("start", 0), *([("stop", 0)] if undone else [])]


async def test_a_start_that_is_dropped_is_no_failure(redis_server: RedisServer, settings_for: Build) -> None:
    """It would have undone a stop: the unit does not rest for that, and the next look decides again."""

    class Dropping(Told):
        async def act(self, verb: str, number: int) -> None:
            raise UnitStopping("systemd refuses StartUnit: transaction is destructive")

    settings = cpu(redis_server, settings_for)
    watcher = Watcher(settings, Dropping(1), (0,), act=True, host="a")
    with Client(settings) as client:
        client.submit(DIGIT)
    with capture_logs() as logs:
        await watcher.step()
    assert [entry["log_level"] for entry in logs if entry["event"] == "start_dropped"] == ["info"]
    assert watcher.history is not None
    assert watcher.history.units[Key(0, "a")].failures == 0


async def test_an_unreadable_redis_holds_and_passes(redis_server: RedisServer, settings_for: Build) -> None:
    """Nothing is started or stopped while Redis is away; once it is back, all goes on."""
    settings = cpu(redis_server, settings_for)
    units = Told(1)
    watcher = Watcher(settings, units, (0,), act=True, host="a")
    await watcher.step()
    with Client(settings) as client:
        client.submit(DIGIT)
    redis_server.kill()
    decision = await watcher.step()
    assert decision is not None
    assert (decision.verdict, units.done) == ("hold", [])
    assert "Redis cannot be read" in decision.why
    redis_server.start()
    with Client(settings) as client:
        client.submit(DIGIT)
    await watcher.step()
    assert units.done == [("start", 0)]


async def test_a_deaf_redis_does_not_starve_the_watchdog(
    settings_for: Build, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It takes connections and never answers: each answer is waited for, and systemd told meanwhile."""
    monkeypatch.setattr(main, "FEED_S", 0.1)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with (
        socket.socket() as deaf,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        systemd.bind(str(tmp_path / "notify"))
        url = f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"
        settings = settings_for(
            redis_server, broker={"url": url, "connect_timeout_s": 0.5}, worker={"device": "cpu"}
        )
        watcher = Watcher(settings, Told(1), (0,), act=True, host="a")
        said: list[str] = []
        asyncio.get_running_loop().add_reader(systemd, lambda: said.append(systemd.recv(4096).decode()))
        decisions = [await watcher.step() for _ in range(2)]
        asyncio.get_running_loop().remove_reader(systemd)
    assert [one.verdict for one in decisions if one] == ["hold", "hold"]
    first = said.index("READY=1")
    assert any(word.startswith("EXTEND_TIMEOUT_USEC=") for word in said[:first])
    assert "WATCHDOG=1" in said[first:]


async def test_an_emptied_redis_is_told_at_the_next_look(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """Which format it has, and which models this host could serve: else they are refused for a minute."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    watcher = Watcher(settings, Told(1), (0,), act=True, host="a")
    await watcher.step()
    client.flushall()
    client.zadd(keys.CATALOGUE, {"another": 1e10})
    await watcher.step()
    assert client.get(keys.FORMAT_KEY) == str(keys.FORMAT).encode()
    with Client(settings) as submitter:
        assert submitter.submit(DIGIT, model="digits")


async def test_a_watcher_that_only_logs_looks_after_its_tasks(
    redis_server: RedisServer, settings_for: Build, tmp_path: Path
) -> None:
    """Nobody else does, as it says that it lives. A dry run touches nothing."""
    settings = settings_for(
        redis_server, worker={"device": "cpu", "run_dir": tmp_path}, watcher={"assumed_rate": 1.0}
    )
    client = connect(settings.broker)
    host = socket.gethostname()
    with Client(settings) as submitter:
        task_id = submitter.submit(DIGIT, model="digits")
    store = Store(client, f"gpu0@{host}", QUEUES, settings.queue, models=("digits",))
    store.register(default="digits")
    (task,) = store.claim(1)
    client.zadd(keys.WORKERS, {store.worker: 1})
    clock = itertools.count(1000.0, PROBE_EVERY_S)
    for tell in (False, True):
        watcher = Watcher(settings, Told(1), (0,), act=False, tell=tell, host=host)
        watcher._reaper._clock = clock.__next__
        for _ in range(8):
            await watcher.step()
        assert client.hexists(store.inflight, str(task.seq)) is not tell
    found: Any = client.rpop("realtime.digits")
    assert decode(found).id == task_id


async def test_another_format_ends_the_watcher_before_it_writes(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """What another edition has laid out is neither read nor changed."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.set(keys.FORMAT_KEY, 1)
    watcher = Watcher(settings, Told(1), (0,), act=True, host="a")
    with pytest.raises(FormatMismatch, match="format 1"):
        await watcher.run(asyncio.Event())
    assert client.keys("*") == [keys.FORMAT_KEY.encode()]


async def test_a_look_that_fails_does_not_end_the_service(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """One bad probe is logged, and the next one may go well."""

    class Bad(Told):
        looks = 0

        async def states(self, numbers: Collection[int] = ()) -> dict[int, UnitView]:
            self.looks += 1
            if self.looks == 1:
                raise RuntimeError("a bug")
            return await super().states()

    settings = settings_for(redis_server, worker={"device": "cpu"}, watcher={"probe_interval_s": 0.1})
    units, stop = Bad(1), asyncio.Event()
    watcher = Watcher(settings, units, (0,), act=True, host="a")
    running = asyncio.create_task(watcher.run(stop))
    while units.looks < 3:
        await asyncio.sleep(0.02)
    stop.set()
    await running
    assert watcher.history is not None
