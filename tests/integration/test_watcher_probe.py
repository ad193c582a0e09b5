# SPDX-License-Identifier: Apache-2.0
"""What the watcher's probe sees in Redis, and what two watchers tell each other there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import orjson
import pytest
from redis.exceptions import OutOfMemoryError

from gpuinfer import Client
from gpuinfer.errors import BrokerUnavailable
from gpuinfer.queue import beats
from gpuinfer.queue.connection import connect
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.watcher.probe import HOSTS, Probe, Seen
from gpuinfer.watcher.state import Instance, Key
from tests.services import RedisServer
from tests.watchers import KNOWN

pytestmark = pytest.mark.integration
Build = Callable[..., Settings]


class Backlog:
    """Three tasks that wait, one worker that may claim them, and a probe whose clock we set."""

    def __init__(self, settings: Settings, client: Client) -> None:
        redis = connect(settings.broker)
        self._client = client
        self._probe = Probe(redis, "a", clock=lambda: self.now)
        self._own = [Instance(key=Key(0, "a"), state="active")]
        self.store = Store(redis, "gpu0@a", QUEUES, settings.queue)
        self.now = 0.0
        for _ in range(3):
            self.submit()

    def submit(self) -> None:
        self._client.submit([1.0], queue="batch")

    def look(self, now: float) -> Seen:
        return self._probe.look(self._own, now)


@pytest.fixture
def backlog(redis_server: RedisServer, settings_for: Build) -> Iterator[Backlog]:
    settings = settings_for(redis_server)
    with Client(settings) as client:
        yield Backlog(settings, client)


def test_the_probe_counts_what_waits_was_claimed_and_is_in_flight(backlog: Backlog) -> None:
    """Per queue, with the age of the oldest that waits."""
    assert backlog.look(0.0).queues["batch"].waiting == 3
    backlog.now = 7.0
    backlog.store.claim(2)
    backlog.submit()
    seen = backlog.look(5.0)
    assert (seen.queues["batch"].waiting, seen.queues["batch"].done, seen.queues["batch"].oldest_s) == (
        2,
        2,
        7.0,
    )
    assert seen.in_flight == {"gpu0@a": 2}
    assert sum(q.in_flight + q.done for q in seen.queues.values()) == 2
    assert seen.beating == frozenset()


def test_what_a_worker_hands_back_was_never_served(backlog: Backlog) -> None:
    """It waits again, since it came; nothing is done, and nothing has arrived anew."""
    totals, oldest = [], []
    claimed = []
    for look in range(3):
        queues = backlog.look(backlog.now).queues
        totals.append(sum(q.waiting + q.in_flight + q.done for q in queues.values()))
        oldest.append(queues["batch"].oldest_s)
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
    other, probe = Probe(client, "b"), Probe(client, "a", clock=lambda: now[0])
    theirs = [Instance(key=Key(n, "b"), state="active") for n in (0, 1)]
    other.look(theirs, 1000.0)
    seen = probe.look([], 5.0)
    assert sorted(seen.live_hosts) == ["a", "b"]
    assert len(seen.remote) == 2
    beats.writer(client)("gpu1@b", [], {"state": "idle"})
    now[0] = 11.0
    seen = probe.look([], 16.0)
    assert sorted(seen.live_hosts) == ["a"]
    assert [one.key for one in seen.remote] == [Key(1, "b")]
    now[0] = 3700.0
    probe.look([], 3700.0)
    assert client.hkeys(HOSTS) == [b"a"]


def test_a_silent_watcher_is_known_at_first_sight(redis_server: RedisServer, settings_for: Build) -> None:
    """Redis's clock tells when it last moved; one that looks seldom has more time for it."""
    client = connect(settings_for(redis_server).broker)
    Probe(client, "b").look([], 1000.0)
    Probe(client, "c", interval_s=15.0).look([], 1000.0)
    for host in (b"b", b"c"):
        body = orjson.loads(client.hget(HOSTS, host.decode()) or b"")
        client.hset(HOSTS, host.decode(), orjson.dumps({**body, "at": body["at"] - 30}).decode())
    assert sorted(Probe(client, "a").look([], 5.0).live_hosts) == ["a", "c"]


def test_a_full_redis_is_looked_at(redis_server: RedisServer, settings_for: Build) -> None:
    """Redis takes nothing new, and just then more workers are needed: the look tells what waits."""
    client = connect(settings_for(redis_server).broker)
    client.lpush("realtime", *[b"x" * 1000] * 3000)
    client.config_set("maxmemory", "2mb")
    with pytest.raises(OutOfMemoryError):
        client.set("more", 1)
    seen = Probe(client, "a").look([Instance(key=Key(0, "a"))], 0.0)
    assert seen.queues["realtime"].waiting == 3000


def test_garbage_of_another_host_is_passed_over(redis_server: RedisServer, settings_for: Build) -> None:
    """One watcher of another version does not blind the others."""
    client = connect(settings_for(redis_server).broker)
    client.hset(
        HOSTS, mapping={"b": "{", "c": '{"beat": 1}', "d": '{"beat": 1, "instances": [{"number": "x"}]}'}
    )
    assert Probe(client, "a").look([], 5.0).remote == ()


def test_no_redis_is_a_typed_error() -> None:
    """The policy is told that it cannot be read."""
    settings = Settings.model_validate({"broker": {"url": "unix:///nowhere/redis.sock"}})
    with pytest.raises(BrokerUnavailable):
        Probe(connect(settings.broker), "a").look([], 0.0)


def test_what_a_watcher_has_measured_is_told(redis_server: RedisServer, settings_for: Build) -> None:
    """Of those that are alive; one of another version, which tells nothing of it, is no less there."""
    client = connect(settings_for(redis_server).broker)
    Probe(client, "b").look([], 1000.0, KNOWN.figures)
    Probe(client, "c").look([], 1000.0)
    seen = Probe(client, "a").look([], 1000.0)
    assert seen.figures == {"b": KNOWN.figures}
    assert sorted(seen.live_hosts) == ["a", "b", "c"]
