# SPDX-License-Identifier: Apache-2.0
"""What the watcher's probe sees in Redis, and what two watchers tell each other there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import orjson
import pytest
import redis
from redis.exceptions import OutOfMemoryError

from gpuinfer import Client
from gpuinfer.errors import BrokerUnavailable
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import EVERYTHING, HOSTS, Serves, servers
from gpuinfer.queue.purge import set_paused
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.watcher import probe
from gpuinfer.watcher.probe import Probe
from gpuinfer.watcher.state import Instance, Key, Observation, QueueState, UnitState
from tests.contract.test_later import AHEAD_S, let_come
from tests.services import RedisServer
from tests.watchers import KNOWN

pytestmark = pytest.mark.integration
Build = Callable[..., Settings]
BATCH = Lane("batch", "digits")


def beat(client: redis.Redis, worker: str, **body: object) -> None:
    """Let a worker say that it lives: for an hour, however long the machine stands still."""
    Store(client, worker, QUEUES, Settings().queue, models=["digits"]).register(
        orjson.dumps({"worker": worker, "state": "idle", **body})
    )
    written = orjson.loads(client.get(keys.heartbeat(worker)) or b"")
    client.set(keys.heartbeat(worker), orjson.dumps({**written, "at": written["at"] + 3600}))


class Backlog:
    """Three tasks that wait, one worker that may claim them, and a probe whose clock we set."""

    def __init__(self, settings: Settings, client: Client) -> None:
        redis = connect(settings.broker)
        self._client = client
        self._probe = Probe(redis, "a", clock=lambda: self.now, startup_s=600.0)
        self._own = [Instance(key=Key(0, "a"), state="active")]
        self.store = Store(redis, "gpu0@a", QUEUES, settings.queue, models=["digits"])
        self.store.register(default="digits")
        self.now = 0.0
        for _ in range(3):
            self.submit()

    def submit(self) -> None:
        self._client.submit([1.0], model="digits", queue="batch")

    def observe(self, now: float) -> Observation:
        return self._probe.observe(self._own, now)

    def batch(self, now: float) -> QueueState:
        return queues_of(self.observe(now))[BATCH]


def queues_of(seen: Observation) -> Mapping[Lane, QueueState]:
    """Return what was seen of the queues."""
    assert seen.queues is not None
    return seen.queues


@pytest.fixture
def backlog(redis_server: RedisServer, settings_for: Build) -> Iterator[Backlog]:
    settings = settings_for(redis_server)
    with Client(settings) as client:
        yield Backlog(settings, client)


def test_the_probe_counts_what_waits_was_claimed_and_is_in_flight(backlog: Backlog) -> None:
    """Per queue, with the age of the oldest that waits."""
    assert backlog.batch(0.0).waiting == 3
    backlog.now = 7.0
    backlog.store.claim(2)
    backlog.submit()
    seen = backlog.observe(5.0)
    batch = queues_of(seen)[BATCH]
    assert (batch.waiting, batch.done, batch.oldest_s) == (2, 2, 7.0)
    assert seen.held == {EVERYTHING: 2}
    assert sum(q.in_flight + q.done for q in queues_of(seen).values()) == 2
    assert [one.busy for one in seen.instances] == [True]


def test_the_probe_sees_what_falls_due_and_what_is_paused(backlog: Backlog) -> None:
    """Within the time that a start takes; what is due by now it puts into its list itself."""
    first, second, third = backlog.store.claim(3)
    due = time.time() + AHEAD_S
    backlog.store.postpone([(first.seq, due), (second.seq, due + 300), (third.seq, due + 3600)])
    set_paused(backlog.store.client, "batch.digits", paused=True)
    let_come(backlog.store, AHEAD_S)
    batch = backlog.batch(0.0)
    assert (batch.waiting, batch.due, batch.paused) == (1, 1, True)


def test_what_a_worker_hands_back_was_never_served(backlog: Backlog) -> None:
    """It waits again, since it came; nothing is done, and nothing has arrived anew."""
    totals, oldest = [], []
    claimed = []
    for look in range(3):
        queues = queues_of(backlog.observe(backlog.now))
        totals.append(sum(q.waiting + q.in_flight + q.done for q in queues.values()))
        oldest.append(queues[BATCH].oldest_s)
        backlog.now += 5.0
        if look == 0:
            claimed = backlog.store.claim(2)
        elif look == 1:
            backlog.store.release([one.seq for one in claimed])
    assert (totals, oldest) == ([3, 3, 3], [0.0, 5.0, 10.0])


def test_a_silent_watcher_is_noticed_by_our_own_clock(redis_server: RedisServer, settings_for: Build) -> None:
    """Its instances are nobody's to start; what beats there still serves; after an hour it is forgotten."""
    client = connect(settings_for(redis_server).broker)
    now = [0.0]
    other, ours = Probe(client, "b"), Probe(client, "a", clock=lambda: now[0])
    theirs = [Instance(key=Key(n, "b"), state="active") for n in (0, 1)]
    other.observe(theirs, 1000.0)
    seen = ours.observe([], 5.0)
    assert sorted(seen.live_hosts) == ["a", "b"]
    assert len(seen.instances) == 2
    beat(client, "gpu1@b")
    now[0] = 11.0
    seen = ours.observe([], 16.0)
    assert sorted(seen.live_hosts) == ["a"]
    assert [one.key for one in seen.instances] == [Key(1, "b")]
    now[0] = 3700.0
    ours.observe([], 3700.0)
    assert client.hkeys(HOSTS) == [b"a"]


def test_a_silent_watcher_is_known_at_first_sight(redis_server: RedisServer, settings_for: Build) -> None:
    """Redis's clock tells when it last moved; one that looks seldom has more time for it."""
    client = connect(settings_for(redis_server).broker)
    Probe(client, "b").observe([], 1000.0)
    Probe(client, "c", interval_s=600.0).observe([], 1000.0)
    for host in (b"b", b"c"):
        body = orjson.loads(client.hget(HOSTS, host.decode()) or b"")
        client.hset(HOSTS, host.decode(), orjson.dumps({**body, "at": body["at"] - 30}).decode())
    assert sorted(Probe(client, "a").observe([], 5.0).live_hosts) == ["a", "c"]


def test_a_full_redis_is_looked_at(redis_server: RedisServer, settings_for: Build) -> None:
    """Redis takes nothing new, and just then more workers are needed: the look tells what waits."""
    client = connect(settings_for(redis_server).broker)
    client.lpush("realtime", *[b"x" * 1000] * 3000)
    client.config_set("maxmemory", "2mb")
    with pytest.raises(OutOfMemoryError):
        client.set("more", 1)
    seen = Probe(client, "a").observe([Instance(key=Key(0, "a"))], 0.0)
    assert queues_of(seen)[Lane("realtime", "")].waiting == 3000


def test_garbage_of_another_host_is_passed_over(redis_server: RedisServer, settings_for: Build) -> None:
    """One watcher of another version does not blind the others."""
    client = connect(settings_for(redis_server).broker)
    client.hset(
        HOSTS, mapping={"b": "{", "c": '{"beat": 1}', "d": '{"beat": 1, "instances": [{"number": "x"}]}'}
    )
    assert Probe(client, "a").observe([], 5.0).instances == ()


def test_no_redis_is_a_typed_error() -> None:
    """The policy is told that it cannot be read."""
    settings = Settings.model_validate({"broker": {"url": "unix:///nowhere/redis.sock"}})
    with pytest.raises(BrokerUnavailable):
        Probe(connect(settings.broker), "a").observe([], 0.0)


def test_who_runs_says_what_he_serves(redis_server: RedisServer, settings_for: Build) -> None:
    """A heartbeat goes before what the settings say, here and on other hosts."""
    client = connect(settings_for(redis_server).broker)
    planned, runs = Serves(QUEUES, ("ocr",)), Serves(("realtime",), ("digits",))
    states: list[UnitState] = ["active", "inactive"]
    theirs = [Instance(key=Key(n, "b"), state=state, serves=planned) for n, state in enumerate(states)]
    Probe(client, "b").observe(theirs, 1000.0)
    for number in range(2):
        beat(client, f"gpu{number}@b", queues=["realtime"], models=["digits"])
    seen = Probe(client, "a").observe([], 1000.0)
    assert [one.serves for one in seen.instances] == [runs, planned]
    (own, _) = Probe(client, "b").observe(theirs, 1000.0).instances
    assert (own.serves, own.busy) == (runs, False)
    assert [(one.number, one.host, one.serves) for one in servers(client)] == [(0, "b", runs), (1, "b", runs)]


def test_a_model_that_a_hosts_worker_cannot_load(redis_server: RedisServer, settings_for: Build) -> None:
    """No other worker of that host would be started for it; elsewhere, and of what else it serves, nothing
    changes."""
    client = connect(settings_for(redis_server).broker)
    both, digits = Serves(QUEUES, ("digits", "ocr")), Serves(QUEUES, ("digits",))
    states: list[UnitState] = ["active", "inactive"]
    for host in ("b", "c"):
        theirs = [Instance(key=Key(n, host), state=state, serves=both) for n, state in enumerate(states)]
        Probe(client, host).observe(theirs, 1000.0)
    beat(client, "gpu0@b", queues=QUEUES, models=["digits"], missing={"ocr": "it is a state dict"})
    beat(client, "gpu0@c", queues=QUEUES, models=["digits", "ocr"], missing={})
    seen = Probe(client, "a").observe([], 1000.0)
    assert {str(one.key): one.serves for one in seen.instances} == {
        "gpu0@b": digits,
        "gpu1@b": digits,
        "gpu0@c": both,
        "gpu1@c": both,
    }


def test_lanes_of_known_models_are_seen_before_any_task_comes(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """The catalogue survives the workers; a lane's first burst is an arrival, not a discovery."""
    client = connect(settings_for(redis_server).broker)
    client.zadd(keys.CATALOGUE, {"digits": 1e10, "ocr": 1e10})
    client.set(keys.DEFAULT_MODEL, "digits")
    client.lpush("batch.ocr", "x")
    queues = queues_of(Probe(client, "a").observe([], 0.0))
    waiting = {lane: queue.waiting for lane, queue in queues.items()}
    lanes = [Lane(tier, model) for tier in QUEUES for model in ("digits", "ocr")]
    assert waiting == {**dict.fromkeys(lanes, 0), Lane("batch", "ocr"): 1}


def test_what_is_in_flight_belongs_to_what_its_worker_serves(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """What a worker of one model holds is none of another model's."""
    client = connect(settings_for(redis_server).broker)
    client.set(keys.DEFAULT_MODEL, "digits")
    client.hset(keys.inflight("gpu0@a"), mapping={"1": "x", "1:realtime.ocr": "x"})
    own = [Instance(key=Key(0, "a"), state="active", serves=Serves(("realtime",), ("ocr",)))]
    queues = queues_of(Probe(client, "a").observe(own, 0.0))
    assert {lane: queue.in_flight for lane, queue in queues.items() if queue.in_flight} == {
        Lane("realtime", "ocr"): 1
    }


def test_a_backlog_that_grows_for_long_takes_little_memory(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task a look: the oldest one's age is exact, and no other's is too low, or too high by much."""
    monkeypatch.setattr(probe, "EXACT", 0.1)
    for second in range(100):
        backlog.now = float(second)
        backlog.submit()
        assert backlog.batch(backlog.now).oldest_s == second
    assert all(len(moments) < 50 for moments in backlog._probe._arrived.values())
    for claimed in range(5, 100, 5):
        backlog.store.claim(5)
        exact = 99 - max(0, claimed - 3)  # four waited at the first look, one more came before each other
        assert exact <= backlog.batch(backlog.now).oldest_s <= exact + 10


def test_what_a_watcher_has_measured_is_told(redis_server: RedisServer, settings_for: Build) -> None:
    """Of those that are alive; one of another version, which tells nothing of it, is no less there."""
    client = connect(settings_for(redis_server).broker)
    Probe(client, "b").observe([], 1000.0, {"all": KNOWN.figures})
    Probe(client, "c").observe([], 1000.0)
    seen = Probe(client, "a").observe([], 1000.0)
    assert seen.figures == {"b": {"all": KNOWN.figures}}
    assert sorted(seen.live_hosts) == ["a", "b", "c"]
