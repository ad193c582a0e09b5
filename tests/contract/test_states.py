# SPDX-License-Identifier: Apache-2.0
"""A task has one end, whatever wrote it, in whatever order and how often."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuinfer import Client
from gpuinfer.errors import DeadLettered, QueueFull, TaskFailed
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.message import decode
from gpuinfer.queue.purge import lines, purge
from gpuinfer.queue.store import Store
from gpuinfer.settings import QueueSettings
from tests.contract.conftest import begin, done, ids, on

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

TASKS = 3
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["claim", "begin", "complete", "fail", "twice", "bury", "cancel", "release", "restore"]
        ),
        st.integers(0, TASKS - 1),
    ),
    max_size=25,
)


def ended(store: Store) -> Counter[str]:
    """Return how many tasks have ended in each way."""
    raw: Any = store.client
    found = {key.decode(): int(count) for key, count in raw.hgetall(keys.ENDED).items()}
    return Counter({label: count for label, count in found.items() if not label.startswith("bytes")})


def failed(task: Claimed) -> Final:
    task_id = decode(task.payload).id
    meta = results.failure(task_id, TaskFailed("no"), worker="w")
    return Final(task.seq, task_id, meta, label="failed realtime digits")


def completed(task: Claimed) -> Final:
    return done(task, task.seq)._replace(label="completed realtime digits")


class Model:
    """What should come of a few tasks."""

    def __init__(self, store: Store, client: Client) -> None:
        self.store, self.client = store, client
        self.ids = [client.submit([number]) for number in range(TASKS)]
        #: Id -> the claim of it that was the last.
        self.claims: dict[str, Claimed] = {}
        self.held: set[str] = set()
        self.started: set[str] = set()
        self.running: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.ends: dict[str, str] = {}
        self.metas: dict[str, bytes] = {}

    def end(self, task_id: str, label: str) -> None:
        self.held.discard(task_id)
        self.ends.setdefault(task_id, label)

    def step(self, what: str, number: int) -> None:
        """Do it, and note what should have come of it."""
        task_id = self.ids[number]
        claim = self.claims.get(task_id)
        if what == "claim":
            for task in self.store.claim(1):
                (found,) = ids([task])
                self.claims[found] = task
                self.held.add(found)
        elif what == "cancel":
            could = task_id not in self.ends
            assert self.client.cancel(task_id) is could
            if could:
                self.ends[task_id] = "cancelled"
        elif what == "restore":
            self.restore()
        elif claim is not None:
            self.act(what, task_id, claim)

    def act(self, what: str, task_id: str, claim: Claimed) -> None:
        if what in ("complete", "fail", "twice"):
            finals = [failed(claim)] if what == "fail" else [completed(claim)]
            if what == "twice":
                finals += [failed(claim), completed(claim)]
            assert self.store.settle(finals) == {}
            self.end(task_id, finals[0].label)
        elif what == "bury":
            self.store.bury(claim.seq, claim.list_key, claim.payload, DeadLettered("no"))
            self.end(task_id, "dead realtime digits")
        elif task_id not in self.held:
            pass
        elif what == "release":
            self.store.release([claim.seq])
            self.held.discard(task_id)
        elif what == "begin":
            assert begin(self.store, [claim]) == ({0} if task_id in self.ends else set())
            self.running = {task_id}
            if task_id not in self.ends:
                self.started.add(task_id)

    def restore(self) -> None:
        dead = set()
        for task_id in self.held:
            self.deaths[task_id] += task_id in self.running
            if self.deaths[task_id] >= 2:
                dead.add(task_id)
        assert set(self.store.restore().dead) == dead
        for task_id in dead:
            self.end(task_id, "dead realtime digits")
        self.started -= self.held - dead
        self.held, self.running = set(), set()

    def check(self) -> None:
        """See that what has ended stays as it was, and is counted once."""
        for task_id in self.ids:
            meta: Any = self.store.client.get(keys.result(task_id))
            if task_id in self.ends:
                assert self.metas.setdefault(task_id, meta) == meta
                assert results.parse(task_id, meta).final
            else:
                state = "running" if task_id in self.started else "queued"
                assert results.parse(task_id, meta).state == state
        assert ended(self.store) == Counter(self.ends.values())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_one_end_whatever_comes(store: Store, client: Client, steps: list[tuple[str, int]]) -> None:
    """Settled, failed, buried, cancelled, put back and again: the first end stands, and is counted once."""
    store.client.flushdb()
    store.register(default="digits")
    model = Model(store, client)
    for what, number in steps:
        model.step(what, number)
        model.check()


def test_what_is_not_kept_is_counted_once(store: Store, client: Client) -> None:
    """Also when its end is written again because the answer was lost."""
    client.submit([1], ignore_result=True)
    (task,) = store.claim(1)
    final = completed(task)._replace(keep=False)
    for _ in range(2):
        assert store.settle([final]) == {}
    assert ended(store) == {"completed realtime digits": 1}
    assert not store.client.exists(keys.result(final.task_id))


def test_cancelled_is_cancelled_as_long_as_its_message_waits(store: Store, client: Client) -> None:
    """However late it comes, it does not run; once its message is dropped, its state expires."""

    def ttl(task_id: str) -> Any:
        return store.client.ttl(keys.result(task_id))

    skipped, late, expired, buried, purged = tasks = [client.submit([n]) for n in range(5)]
    held = store.claim(4)
    begin(store, held[1:2])
    for task_id in tasks:
        assert client.cancel(task_id)
        assert ttl(task_id) == -1
    assert begin(store, held) == {0, 1, 2, 3}
    store.settle([Final(held[0].seq, "", b"", parent=skipped), completed(held[1]), failed(held[2])])
    store.bury(held[3].seq, held[3].list_key, held[3].payload, DeadLettered("no"))
    assert purge(store.client, lines(store.client), QueueSettings()) == 1
    assert min(map(ttl, (skipped, late, expired, buried, purged))) > 3000
    assert {client.status(task_id).state for task_id in tasks} == {"revoked"}
    assert ended(store) == {"cancelled": 5}


def test_a_full_redis_takes_no_end_of_a_task_that_nothing_is_known_of(store: Store, client: Client) -> None:
    """What waits is cancelled however full it is; an id that anybody may have made up takes no room then."""
    known = client.submit([1])
    assert client.cancel("a plain producer's")
    store.client.config_set("maxmemory", 1)
    assert client.cancel(known)
    before = store.client.dbsize()
    with pytest.raises(QueueFull):
        client.cancel("made up")
    assert store.client.dbsize() == before
    assert ended(store) == {"cancelled": 1, "cancelled_unknown": 1}


def test_bytes_are_counted_by_lane(store: Store, client: Client) -> None:
    """Those of the results that are kept."""
    client.submit_many([[1]] * 3)
    finals = [completed(task) for task in store.claim(3)]
    store.settle([*finals[:2], finals[2]._replace(keep=False)])
    size = sum(len(final.meta) for final in finals[:2])
    assert store.client.hget(keys.ENDED, "bytes realtime digits") == str(size).encode()


def test_a_key_that_is_not_ours(store: Store, client: Client) -> None:
    """Something else stands where a result should: it is named, and nothing else is the worse for it."""
    client.submit_many([[1]] * 3)
    finals = [completed(task) for task in store.claim(3)]
    key = keys.result(finals[1].task_id)
    store.client.delete(key)
    store.client.lpush(key, "something else")
    refused = store.settle(finals)
    assert list(refused) == [finals[1].task_id]
    assert "WRONGTYPE" in refused[finals[1].task_id]
    raw: Any = store.client
    assert raw.lrange(key, 0, -1) == [b"something else"]
    assert [client.status(final.task_id).state for final in (finals[0], finals[2])] == ["completed"] * 2
    assert not store.client.exists(store.inflight)


@pytest.mark.parametrize("others", [(0, 1), (70, 130)])
def test_a_large_batch_with_a_few_that_have_ended(
    store: Store, client: Client, others: tuple[int, int]
) -> None:
    """States are read many at a time; what has ended, or is no state, is told from what waits."""
    client.submit_many([[number] for number in range(200)])
    tasks = store.claim(200)
    sent = ids(tasks)
    cancelled, foreign = others
    assert client.cancel(sent[cancelled])
    raw: Any = store.client
    raw.delete(keys.result(sent[foreign]))
    raw.lpush(keys.result(sent[foreign]), "another's")
    assert store.begin([(task.seq, task_id, b"") for task, task_id in zip(tasks, sent, strict=True)]) == {
        cancelled
    }
    refused = store.settle([completed(task) for task in tasks])
    assert "WRONGTYPE" in refused[sent[foreign]]
    states = Counter(client.status(task_id).state for task_id in sent if task_id != sent[foreign])
    assert states == {"completed": 198, "revoked": 1}
