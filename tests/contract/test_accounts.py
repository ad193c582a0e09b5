# SPDX-License-Identifier: Apache-2.0
"""What processes count and add to the sums in Redis: once each, whatever is sent twice or lost."""

from __future__ import annotations

from typing import cast

import pytest
import redis

from gpuinfer.queue import keys, usage
from gpuinfer.queue.epoch import REAPER
from gpuinfer.queue.message import Envelope
from gpuinfer.queue.store import Store
from gpuinfer.queue.tally import Tally
from gpuinfer.settings import BrokerSettings, QueueSettings
from gpuinfer.worker.accounting import Accounts
from gpuinfer.worker.buffer import Batch, Part
from gpuinfer.worker.task import Task
from tests.contract.conftest import on, send

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-socket")]


def counts(store: Store) -> dict[str, int]:
    found: dict[bytes, bytes] = store.client.hgetall(keys.COUNTS)  # type: ignore[assignment]
    return {name.decode(): int(count) for name, count in found.items()}


def flush(store: Store, tally: Tally) -> None:
    store.account(tally.args())
    tally.confirm()


def test_a_flush_that_comes_twice_adds_once(store: Store) -> None:
    """Its answer may be lost: the sender sends it again, and so may its library."""
    tally = Tally()
    tally.use("requests", "alice", "resnet", 3)
    tally.count("status", "202", count=3)
    first = list(tally.args())
    store.account(first)
    store.account(first)
    tally.use("requests", "alice", "resnet", 4)  # counted meanwhile
    store.account(tally.args())  # as nobody has confirmed it
    assert usage.read(store.client).accounts[0].requests == 3
    tally.confirm()
    flush(store, tally)
    store.account(first)  # very late
    (account,) = usage.read(store.client).accounts
    assert (account.key, account.model, account.requests) == ("alice", "resnet", 7)
    assert counts(store) == {"status 202 -": 3}
    assert not tally.dirty


def test_processes_add_up(store: Store) -> None:
    """By key, by model, or by both; what has used most device time comes first."""
    for _ in range(2):
        tally = Tally()
        tally.use("requests", "alice", "resnet", 1)
        tally.use("device_us", "alice", "resnet", 10)
        tally.use("device_us", "", "resnet", 70)
        tally.use("bytes_in", "alice", "", 5)
        flush(store, tally)
    found = usage.read(store.client)
    assert [(one.key, one.model) for one in found.accounts] == [
        ("-", "resnet"),
        ("alice", "resnet"),
        ("alice", "-"),
    ]
    assert [(one.key, one.device_us, one.bytes_in) for one in found.by("key").accounts] == [
        ("-", 140, 0),
        ("alice", 20, 10),
    ]
    assert [(one.model, one.device_us) for one in found.by("model").accounts] == [("resnet", 160), ("-", 0)]
    for hour in store.client.scan_iter(f"{keys.USAGE_PREFIX}*"):  # one, or two where the last has just begun
        assert 0 < store.client.ttl(hour) <= 35 * 86400


def test_names_without_end_count_for_other(store: Store) -> None:
    """Somebody may make models or callers up: a hash has a bound, and its sums stay right."""
    fields = {f"status {n} -": 1 for n in range(keys.MOST_COUNTS)}
    store.client.hset(keys.COUNTS, mapping=fields)  # type: ignore[arg-type]  # int is fine
    tally = Tally()
    tally.count("status", "1", count=2)
    tally.count("status", "new", count=3)
    tally.count("status", "newer", count=4)
    flush(store, tally)
    found = counts(store)
    assert (found["status 1 -"], found["status other other"]) == (3, 7)
    assert len(found) == keys.MOST_COUNTS + 1


def test_a_name_is_one_word(store: Store) -> None:
    """A plain producer's list may have a caller with blanks in it."""
    tally = Tally()
    tally.use("device_us", "a b", "", 1)
    flush(store, tally)
    assert [(one.key, one.model) for one in usage.read(store.client).accounts] == [("a_b", "-")]


def test_a_batch_is_divided_among_its_inputs(store: Store) -> None:
    """Device time by share, how long each task waited and ran, and the batch's size."""
    send(store, 1, caller="alice")
    send(store, 1, caller="bob")
    claimed = store.claim(2)
    tasks = []
    for one in claimed:
        envelope = cast(Envelope, _Sent(100.0))
        tasks.append(Task(one, envelope, "digits", [0], None, "list", 1, 1, None, time_start=100.02))
    alice, bob = sorted(tasks, key=lambda task: task.claimed.list_key)
    batch = Batch("digits", (Part(alice, 0, 3), Part(bob, 0, 1)), 1, 1)
    tally = Tally()
    accounts = Accounts(store, tally)
    accounts.ran(batch, 0.4)
    for task in tasks:
        task.ran_s = 0.4
        accounts.ended(task, 100.45)
    accounts.flush(last=True)
    found = {one.key: one.device_us for one in usage.read(store.client).accounts}
    assert found == {"alice": 300_000, "bob": 100_000}
    assert {name: count for name, count in counts(store).items() if not name.startswith("sub")} == {
        "device_us alice digits": 300_000,
        "device_us bob digits": 100_000,
        "batch:2 - digits": 1,
        "batch_sum - digits": 4,
        "wait:4 realtime digits": 2,  # up to 25 ms
        "wait_us realtime digits": 40_000,
        "run:8 realtime digits": 2,  # up to 0.5 s
        "run_us realtime digits": 800_000,
        "total:8 realtime digits": 2,
        "total_us realtime digits": 900_000,
    }


def test_what_comes_again_is_counted(store: Store) -> None:
    """By what put it back; a worker that was taken for dead counts, too. What is submitted counts once."""
    send(store, 3)
    store.claim(3)
    store.restore()
    store.claim(2)
    reaper = Store(store.client, store.worker, store.queues, QueueSettings(), by=f"{REAPER} watcher@here")
    assert reaper.take_back(after=0).returned == 2
    assert counts(store) == {
        "submitted realtime digits": 3,
        "redelivered restart -": 3,
        "redelivered reaper -": 2,
        "reaped - -": 1,
    }


class _Sent:
    def __init__(self, at: float) -> None:
        self.sent_at = at


def test_what_redis_does_not_take_is_told_later(store: Store, broker: BrokerSettings) -> None:
    """No count is lost, and none comes twice, where the connection breaks."""
    tally = Tally()
    tally.use("requests", "", "", 1)
    store.client.script_flush()
    other = redis.Redis.from_url(broker.url)
    other.client_kill_filter(_type="normal", skipme=True)
    other.close()
    tries = 0
    while tally.dirty:
        tries += 1
        try:
            flush(store, tally)
        except redis.ConnectionError:
            assert tries < 5
    assert usage.read(store.client).accounts[0].requests == 1
