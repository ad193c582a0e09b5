# SPDX-License-Identifier: Apache-2.0
"""The reaper on a real Redis: whose tasks it puts back, and whose it leaves."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.doctor.fleet import orphans
from gpuinfer.doctor.host import Finding, Host
from gpuinfer.errors import TakenBack, WorkerRunning
from gpuinfer.locks import acquire, domain
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.epoch import REAPER
from gpuinfer.queue.message import decode
from gpuinfer.queue.orphans import ago, command, holder, holders
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Loaded, Settings
from gpuinfer.watcher.reaper import FORGET_EVERY_S, PROBE_EVERY_S, WITNESS_S, Reaper
from gpuinfer.watcher.units import UnitView
from gpuinfer.worker.restoring import put_back
from tests.brokers import our_redis
from tests.services import RedisServer

pytestmark = pytest.mark.integration

HOST = "here"


class Place:
    """A reaper with a clock of its own, and workers that hold tasks."""

    def __init__(self, server: RedisServer, settings: Settings, client: Client) -> None:
        self.server, self.settings, self.client = server, settings, client
        self.redis: redis.Redis = connect(settings.broker)
        self.now = 1000.0
        self.reaper = self.another()
        self.views: dict[int, UnitView] = {}
        self.live: set[str] = {HOST}

    def another(self) -> Reaper:
        """Return one more reaper."""
        return Reaper(connect(self.settings.broker), HOST, self.settings, clock=lambda: self.now)

    def holds(self, worker: str, tasks: int, *, silent_s: float) -> tuple[Store, list[str]]:
        """Let a worker claim, begin the first, and fall silent; return its store, and what it holds."""
        ids = [self.client.submit([float(n)], model="m") for n in range(tasks)]
        store = Store(self.redis, worker, QUEUES, self.settings.queue, models=("m",))
        claimed = store.claim(tasks)
        store.begin([(claimed[0].seq, ids[0], b"")])
        self.silence(worker, silent_s)
        return store, ids

    def silence(self, worker: str, seconds: float) -> None:
        """Let a worker's last heartbeat be so old."""
        at = self.redis.time()[0] - seconds
        self.redis.zadd(keys.WORKERS, {worker: at})
        self.redis.set(keys.heartbeat(worker), orjson.dumps({"at": at, "domain": "its own"}))

    def look(self, seconds: float = PROBE_EVERY_S, *, away: bool = False) -> list[str]:
        """Let time pass, with looks as a watcher makes them; return whose tasks were put back."""
        reaped: list[str] = []
        for _ in range(max(1, round(seconds / PROBE_EVERY_S))):
            self.now += PROBE_EVERY_S
            reaped += self.reaper.step(self.views, self.live, away=away)
        return reaped

    def waiting(self) -> list[str]:
        """Return the ids of what waits for the model, the first to be served first."""
        found: list[bytes] = self.redis.lrange("realtime.m", 0, -1)  # type: ignore[assignment]
        return [decode(payload).id for payload in reversed(found)]


@pytest.fixture
def place(
    redis_server: RedisServer, settings_for: Callable[..., Settings], tmp_path: Path, client: Client
) -> Place:
    return Place(redis_server, settings_for(redis_server, worker={"run_dir": tmp_path / "run"}), client)


def told(logs: list[Any], action: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == action]


def test_a_host_that_burned(place: Place) -> None:
    """Silent for two minutes, and for one before the reaper's own eyes: all comes back, in its order."""
    _, ids = place.holds("gpu0@old", 3, silent_s=130)
    with capture_logs() as logs:
        assert place.look(WITNESS_S) == []
        assert place.waiting() == []
        assert place.look(2 * PROBE_EVERY_S) == ["gpu0@old"]
        assert place.look(WITNESS_S) == []
    assert place.waiting() == ids
    again = Store(place.redis, "gpu1@old", QUEUES, place.settings.queue, models=("m",)).claim(3)
    assert [decode(task.payload).deaths for task in again] == [1, 0, 0]
    assert len(told(logs, "worker_silent")) == 1  # each reason once
    (entry,) = told(logs, "reaped")
    assert (entry["worker"], entry["returned"], entry["dead"]) == ("gpu0@old", 3, 0)
    assert set(entry["task_ids"]) == set(ids)
    assert entry["why"] == "nothing was heard of it for 2 min, nor of a watcher of old"
    assert entry["log_level"] == "warning"


def test_the_second_death(place: Place) -> None:
    """What has run at two workers that died is a dead letter, and the rest waits."""
    _, ids = place.holds("gpu0@old", 2, silent_s=130)
    place.look(WITNESS_S + 2 * PROBE_EVERY_S)
    store = Store(place.redis, "gpu0@old", QUEUES, place.settings.queue, models=("m",))
    claimed = store.claim(2)
    store.begin([(claimed[0].seq, ids[0], b"")])
    place.silence("gpu0@old", 130)
    with capture_logs() as logs:
        assert place.look(WITNESS_S + 2 * PROBE_EVERY_S) == ["gpu0@old"]
    (entry,) = told(logs, "reaped")
    assert (entry["returned"], entry["dead"], set(entry["task_ids"])) == (1, 1, set(ids))
    assert place.waiting() == ids[1:]
    assert place.client.status(ids[0]).state == "failed"
    assert place.redis.hlen(keys.DEAD) == 1


@pytest.mark.parametrize("sign", ["heartbeat", "watcher", "lock", "off"])
def test_one_that_may_live(place: Place, sign: str, settings_for: Callable[..., Settings]) -> None:
    """A heartbeat, a watcher on its host, a process with its lock on this one, or 0: it is left alone."""
    worker = "gpu9@here" if sign == "lock" else "gpu0@old"
    place.holds(worker, 2, silent_s=1 if sign == "heartbeat" else 1000)
    lock = acquire(place.settings.worker.run_dir, worker) if sign == "lock" else None
    if sign == "watcher":
        place.live.add("old")
    if sign == "off":
        place.settings = settings_for(place.server, watcher={"reap_after_s": 0})
        place.reaper = place.another()
    assert place.look(WITNESS_S + 4 * PROBE_EVERY_S) == []
    assert [one.tasks for one in holders(place.redis)] == [2]
    if lock is not None:  # a number beyond those of this host's units: it is taken for another host's
        lock.close()
        assert place.look() == [worker]


def test_after_redis_was_away(place: Place) -> None:
    """All heartbeats are old, and all workers live: silence counts from when Redis answers again."""
    place.holds("gpu0@old", 2, silent_s=100)
    place.look(WITNESS_S)
    place.silence("gpu0@old", 1000)
    place.look(away=True)
    assert place.look(WITNESS_S - PROBE_EVERY_S) == []
    place.silence("gpu0@old", 0)  # it is back
    assert place.look(2 * WITNESS_S) == []


def test_looks_too_far_apart(place: Place) -> None:
    """A watcher that was stopped itself has not seen what was meanwhile."""
    place.holds("gpu0@old", 2, silent_s=1000)
    place.look(WITNESS_S - PROBE_EVERY_S)
    place.now += 1000
    assert place.look() == []
    assert place.look(WITNESS_S + PROBE_EVERY_S) == ["gpu0@old"]


def test_nothing_while_redis_does_not_answer(place: Place) -> None:
    """No error, no restore; the next look goes on."""
    place.holds("gpu0@old", 2, silent_s=1000)
    place.look(WITNESS_S)
    place.server.kill()
    with capture_logs() as logs:
        assert place.look(2 * PROBE_EVERY_S) == []
    assert logs == []


def test_a_unit_of_this_host(place: Place) -> None:
    """Down, its lock free, its heartbeat old: put back within some seconds."""
    place.holds("gpu0@here", 2, silent_s=11)
    place.views = {0: UnitView(state="active")}
    assert place.look(20) == []
    place.views = {0: UnitView(state="failed")}
    with acquire(place.settings.worker.run_dir, "gpu0@here"):
        assert place.look(20) == []
    assert place.look() == ["gpu0@here"]


def test_another_host_of_this_name(place: Place) -> None:
    """Whose worker could not be here: its unit's being down tells nothing, and it is given its time."""
    place.holds("gpu0@here", 2, silent_s=11)
    place.views = {0: UnitView(state="failed")}
    domain(place.settings.worker.run_dir)  # another one than in its heartbeat
    assert place.look(WITNESS_S) == []
    place.silence("gpu0@here", 130)
    assert place.look(WITNESS_S) == []
    assert place.look(2 * PROBE_EVERY_S) == ["gpu0@here"]


def test_two_reapers(place: Place) -> None:
    """The second is refused, whatever the first has done by then, and nothing is counted twice."""
    store, ids = place.holds("gpu0@old", 2, silent_s=1000)
    seen = holder(place.redis, "gpu0@old")
    reapers = [
        Store(place.redis, "gpu0@old", QUEUES, place.settings.queue, by=f"{REAPER} watcher@{host}")
        for host in "ab"
    ]
    assert reapers[0].take_back(after=seen.epoch).returned == 2
    with pytest.raises(TakenBack, match="reaper watcher@a"):
        reapers[1].take_back(after=seen.epoch)
    assert place.waiting() == ids
    with pytest.raises(TakenBack):
        store.claim(1)


def test_a_worker_that_starts_at_that_moment(place: Place) -> None:
    """Who has begun an epoch since the reaper's look is not taken for dead."""
    place.holds("gpu0@old", 2, silent_s=1000)
    seen = holder(place.redis, "gpu0@old")
    new = Store(place.redis, "gpu0@old", QUEUES, place.settings.queue, models=("m",))
    assert new.restore().returned == 2
    held = new.claim(2)
    late = Store(place.redis, "gpu0@old", QUEUES, place.settings.queue, by=f"{REAPER} watcher@a")
    with pytest.raises(WorkerRunning):
        late.take_back(after=seen.epoch)
    assert len(held) == 2
    assert [one.tasks for one in holders(place.redis)] == [2]


def test_back_after_a_reaper(place: Place) -> None:
    """It begins a new epoch; cut off there, its next claim does; and not in place of another process."""
    store, ids = place.holds("gpu0@old", 2, silent_s=1000)
    place.look(WITNESS_S + 2 * PROBE_EVERY_S)
    with pytest.raises(TakenBack):
        store.claim(1)
    store.rejoin()
    assert [decode(task.payload).id for task in store.claim(2)] == ids
    place.silence("gpu0@old", 1000)
    place.look(WITNESS_S + 2 * PROBE_EVERY_S)
    place.server.kill()
    with pytest.raises(redis.ConnectionError):
        store.rejoin()
    assert store.uncertain


def test_not_in_place_of_another_process(place: Place) -> None:
    """A process that took the name after the reaper keeps it."""
    store, _ = place.holds("gpu0@old", 2, silent_s=1000)
    place.look(WITNESS_S + 2 * PROBE_EVERY_S)
    with pytest.raises(TakenBack):
        store.claim(1)
    Store(place.redis, "gpu0@old", QUEUES, place.settings.queue).restore()
    with pytest.raises(WorkerRunning):
        store.rejoin()


def test_the_doctor(place: Place) -> None:
    """A warning while a watcher is to put it back, an error when none has, each with the command."""
    here = Host(Loaded(place.settings, {}))
    assert orphans(here) == Finding("ok", "0 tasks in flight, all at workers that send heartbeats")
    place.holds("gpu0@old", 2, silent_s=-60)  # it is fresh, however late it is looked at
    assert orphans(here) == Finding("ok", "2 tasks in flight, all at workers that send heartbeats")
    place.silence("gpu0@old", 60)
    (found,) = orphans(here)  # type: ignore[misc]  # one, in a list
    assert (found.status, found.remedy) == ("warning", "gpuinfer restore --name gpu0@old")
    said = r"gpu0@old holds 2 tasks and has sent no heartbeat for \d+ s; a watcher puts them back after 2 min"
    assert re.fullmatch(said, found.message)
    place.silence("gpu0@old", 240)
    (found,) = orphans(here)  # type: ignore[misc]
    assert (found.status, found.remedy) == ("error", "gpuinfer restore --name gpu0@old")


def test_the_doctor_on_the_workers_own_host(place: Place) -> None:
    """By its number; and not while its process runs."""
    name = f"gpu3@{socket.gethostname()}"
    place.holds(name, 2, silent_s=60)
    here = Host(Loaded(place.settings, {}))
    (found,) = orphans(here)  # type: ignore[misc]
    assert (found.status, found.remedy) == ("warning", "gpuinfer restore 3")
    with acquire(place.settings.worker.run_dir, name):
        (found,) = orphans(here)  # type: ignore[misc]
    assert "though its process runs" in found.message


def test_words() -> None:
    """Spans and commands as people read them."""
    assert [ago(s) for s in (0.4, 119, 240, 7199, 7200, 86400 * 3)] == [
        "0 s",
        "119 s",
        "4 min",
        "120 min",
        "2 h",
        "3 days",
    ]
    assert command("gpu3@a", "a") == "gpuinfer restore 3"
    assert command("gpu3@b", "a") == "gpuinfer restore --name gpu3@b"


@pytest.mark.parametrize("deaths", [0, 1])
def test_with_our_users(tmp_path: Path, deaths: int) -> None:
    """What the watcher's login may do is enough for a restore and a burial; the worker's, for one by hand."""
    with our_redis() as server:
        logins = {
            user: Settings.model_validate(
                {"broker": server.login(user), "worker": {"run_dir": tmp_path / "run"}, "queue": {}}
            )
            for user in ("admin", "api", "worker", "watcher")
        }
        with Client(logins["api"]) as client:
            task_id = client.submit([1.0], model="m")
        now = 1000.0
        reaper = Reaper(connect(logins["watcher"].broker), HOST, logins["watcher"], clock=lambda: now)
        for death in range(deaths + 1):
            store = Store(
                connect(logins["worker"].broker), "gpu0@old", QUEUES, logins["worker"].queue, models=("m",)
            )
            (task,) = store.claim(1)
            store.begin([(task.seq, task_id, b"")])
            with server.client() as admin:
                admin.zadd(keys.WORKERS, {"gpu0@old": 1})
            reaped: list[str] = []
            for _ in range(round(WITNESS_S / PROBE_EVERY_S) + 2):
                now += PROBE_EVERY_S
                reaped += reaper.step({}, {HOST})
            assert reaped == ["gpu0@old"], death
        with server.client() as admin:
            assert admin.hlen(keys.DEAD) == deaths
        assert put_back(logins["worker"], "gpu0@old").returned == 0
        with server.client() as admin:  # that was an epoch more; a day later it is forgotten
            assert admin.exists(keys.epoch("gpu0@old"))
            now += FORGET_EVERY_S
            reaper.step({}, {HOST})
            assert not admin.exists(keys.epoch("gpu0@old"))
