# SPDX-License-Identifier: Apache-2.0
"""The watcher one step at a time, on a real Redis: what several of them tell each other, and keep."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis.exceptions import OutOfMemoryError
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.api.schemas import DIGIT
from gpuinfer.errors import FormatMismatch, UnitRefused, UnitStopping, UnitsUnavailable
from gpuinfer.models.signature import Signature
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.fleet import HOSTS
from gpuinfer.queue.message import decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.watcher import main, notes
from gpuinfer.watcher.main import Watcher
from gpuinfer.watcher.probe import DECISIONS, MEMORY_PREFIX
from gpuinfer.watcher.reaper import LOOK_EVERY_S
from gpuinfer.watcher.state import Key
from gpuinfer.watcher.units import UnitView
from tests.services import RedisServer

pytestmark = pytest.mark.integration
Build = Callable[..., Settings]


class Told:
    """Units that only remember what they were told to do."""

    def __init__(self, count: int) -> None:
        self.views = dict.fromkeys(range(count), UnitView())
        self.done: list[tuple[str, int]] = []

    async def open(self) -> None: ...

    async def look(self) -> dict[int, UnitView]:
        return self.views

    async def act(self, verb: str, number: int) -> None:
        self.done.append((verb, number))
        self.views[number] = UnitView(state="activating" if verb == "start" else "inactive")

    async def close(self) -> None: ...


def cpu(server: RedisServer, build: Build) -> Settings:
    """Return settings for a host without a GPU."""
    return build(server, worker={"device": "cpu"}, watcher={"assumed_rate": 1.0})


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
        async def look(self) -> dict[int, UnitView]:
            stop.set()  # the workers stop together with us, and are seen to
            return self.views

    settings = cpu(redis_server, settings_for)
    with Client(settings) as client:
        for _ in range(12):
            client.submit(DIGIT)
    for units, done in ((Stopping(4), [("start", 0), ("stop", 0)]), (Late(4), [])):
        stop = asyncio.Event()
        watcher = Watcher(settings, units, (0, 1, 2, 3), act=True, host="a")
        await asyncio.wait_for(watcher.run(stop), 30)
        assert units.done == done
    assert watcher.history is None or not any(unit.hold for unit in watcher.history.units.values())


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
        monkeypatch.setattr(main, "UNDO_S", undo_s)
        units, stop = Unsure(error), asyncio.Event()
        await asyncio.wait_for(Watcher(settings, units, (0,), act=True, host="a").run(stop), 30)
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


async def test_a_new_life_remembers_what_the_last_one_did(
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


async def test_models_that_could_not_be_made_known(redis_server: RedisServer, settings_for: Build) -> None:
    """They are at the next look, and why not is said once."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.set(keys.CATALOGUE, "no set")
    watcher = Watcher(settings, Told(1), (0,), act=True, host="a")
    models = [watcher._instance(0, UnitView(), 0.0)]
    with capture_logs() as logs:
        assert [watcher._make_known(models) for _ in range(2)] == [False, False]
        client.delete(keys.CATALOGUE)
        await watcher.step()
    assert client.zrange(keys.CATALOGUE, 0, -1) == [b"digits"]
    assert [entry["event"] for entry in logs].count("models_not_made_known") == 1


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
    clock = itertools.count(1000.0, LOOK_EVERY_S)
    for tell in (False, True):
        watcher = Watcher(settings, Told(1), (0,), act=False, tell=tell, host=host)
        watcher._reaper._clock = clock.__next__
        for _ in range(8):
            await watcher.step()
        assert client.hexists(store.inflight, str(task.seq)) is not tell
    found: Any = client.rpop("realtime.digits")
    assert decode(found).id == task_id


def one_each(number: int) -> dict[str, str]:
    """Return the environments of two instances: realtime for digits, and everything for ocr."""
    special = [{"GPUINFER_WORKER_QUEUES": "realtime"}, {"GPUINFER_WORKER_MODELS": "ocr"}]
    return special[number]


async def test_a_backlog_starts_who_serves_it(redis_server: RedisServer, settings_for: Build) -> None:
    """By each instance's own settings; a model that nothing runs for is known, and starts its worker."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.zadd(keys.CATALOGUE, {"digits": 1e10, "ocr": 1e10})
    client.set(keys.DEFAULT_MODEL, "digits")
    units = Told(2)
    watcher = Watcher(settings, units, (0, 1), act=True, host="a", environment=one_each)
    with Client(settings) as submitter:
        submitter.submit(DIGIT, model="digits", queue="batch")
        await watcher.step()
        assert units.done == []
        submitter.submit([1.0], model="ocr", queue="batch")
    await watcher.step()
    assert units.done == [("start", 1)]
    told = orjson.loads(client.hget(HOSTS, "a") or b"")["instances"]
    assert [(one["tiers"], one["models"]) for one in told] == [
        (["realtime"], ["digits"]),
        (["realtime", "default", "batch"], ["ocr"]),
    ]


async def test_what_waits_for_nobody_is_said_once(redis_server: RedisServer, settings_for: Build) -> None:
    """A warning when it begins, a line when it has ended; not at each look."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.zadd(keys.CATALOGUE, {"digits": 1e10})
    client.set(keys.DEFAULT_MODEL, "digits")
    watcher = Watcher(settings, Told(2), (0, 1), act=True, host="a", environment=one_each)
    with Client(settings) as submitter, capture_logs() as logs:
        await watcher.step()
        for _ in range(3):
            submitter.submit(DIGIT, model="digits", queue="batch")
            await watcher.step()
        client.delete("batch")
        for _ in range(2):
            await watcher.step()
    said = [entry for entry in logs if entry["event"] in ("nothing_serves", "served_again")]
    assert [(entry["event"], entry["log_level"], entry["queue"], entry["model"]) for entry in said] == [
        ("nothing_serves", "warning", "batch", "digits"),
        ("served_again", "info", "batch", "digits"),
    ]
    assert said[0]["waiting"] == 1
    assert "GPUINFER_WORKER_QUEUES=realtime,batch" in said[0]["hint"]


async def test_models_that_could_be_served_are_made_known(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """Those that are installed, of instances that may run; also when Redis is full."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.lpush("realtime", *[b"x" * 1000] * 3000)
    client.config_set("maxmemory", "2mb")
    models = [{"GPUINFER_WORKER_MODELS": name} for name in ("digits,nowhere", "digits-photo", "digits")]
    units = Told(3)
    units.views[1] = UnitView(masked=True)
    watcher = Watcher(settings, units, (0, 1, 2), act=True, host="a", environment=lambda n: models[n])
    await watcher.step()
    assert client.zrange(keys.CATALOGUE, 0, -1) == [b"digits"]
    seen: Any = client.zscore(keys.CATALOGUE, "digits")
    assert abs(client.time()[0] - seen) < 60
    said: Any = client.hgetall(keys.SIGNATURES)
    assert list(said) == [b"digits"]
    assert Signature.from_json(orjson.loads(said[b"digits"])).inputs[0].shape == (1, 8, 8)


async def test_a_file_of_an_instance_that_cannot_be_read_is_said_once(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """It is taken to serve what all serve, until it can be read."""
    settings = cpu(redis_server, settings_for)
    texts = [{"GPUINFER_WORKER_QUEUES": "sometimes"}]
    watcher = Watcher(settings, Told(1), (0,), act=True, host="a", environment=lambda _: texts[-1])
    with capture_logs() as logs:
        for _ in range(3):
            await watcher.step()
    assert len([entry for entry in logs if entry["event"] == "instance_settings_unreadable"]) == 1
    assert told_tiers(settings) == ["realtime", "default", "batch"]
    texts.append({"GPUINFER_WORKER_QUEUES": "batch"})
    await watcher.step()
    assert told_tiers(settings) == ["batch"]


def told_tiers(settings: Settings) -> object:
    """Return the queues of the only instance, as its watcher tells the others."""
    return orjson.loads(connect(settings.broker).hget(HOSTS, "a") or b"")["instances"][0]["tiers"]


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


async def test_the_explanation_has_a_line_for_each_part_of_the_fleet(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """What waits for whom, how many run, and what is wanted."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.set(keys.DEFAULT_MODEL, "ocr")
    watcher = Watcher(settings, Told(2), (0, 1), act=True, host="a", environment=one_each)
    client.lpush("batch", "x")
    await watcher.step()
    told = notes.told(orjson.loads(client.lrange(DECISIONS, 0, 0)[0]), "now").splitlines()
    assert told[0].startswith("now  a  scale_up: realtime,default,batch:ocr: 1 wanted, 0 run; ")
    assert told[2:] == [
        "    realtime,default,batch:ocr: 1 waiting, 0 of 1 run, 1 wanted, 1/s a worker",
        "    realtime:digits: 0 waiting, 0 of 1 run, 0 wanted, 1/s a worker",
        "    start gpu1@a: 1 wanted, 0 run",
    ]


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


async def test_why_nothing_is_started_is_explained(redis_server: RedisServer, settings_for: Build) -> None:
    """Tasks wait, and no instance may be started: that is a decision, too, and it is told once."""
    settings = cpu(redis_server, settings_for)
    units = Told(2)
    units.views = {0: UnitView(state="failed"), 1: UnitView(masked=True)}
    watcher = Watcher(settings, units, (0, 1), act=True, host="a")
    with Client(settings) as client:
        for _ in range(30):
            client.submit(DIGIT)
    for _ in range(3):
        await watcher.step()
    kept = [orjson.loads(text) for text in connect(settings.broker).lrange(DECISIONS, 0, -1)]
    assert [(entry["verdict"], entry["actions"]) for entry in kept] == [("hold", [])]
    told = notes.told(kept[0], "now")
    assert "wanted, but no instance is left to start" in told
    assert "gpu0@a: in quarantine for 30 s: its unit failed; gpu1@a: masked" in told


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


async def test_a_look_that_fails_does_not_end_the_service(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """One bad probe is logged, and the next one may go well."""

    class Bad(Told):
        looks = 0

        async def look(self) -> dict[int, UnitView]:
            self.looks += 1
            if self.looks == 1:
                raise RuntimeError("a bug")
            return await super().look()

    settings = settings_for(redis_server, worker={"device": "cpu"}, watcher={"probe_interval_s": 0.1})
    units, stop = Bad(1), asyncio.Event()
    watcher = Watcher(settings, units, (0,), act=True, host="a")
    running = asyncio.create_task(watcher.run(stop))
    while units.looks < 3:
        await asyncio.sleep(0.02)
    stop.set()
    await running
    assert watcher.history is not None
