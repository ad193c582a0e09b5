# SPDX-License-Identifier: Apache-2.0
"""Putting back in small calls: no call keeps Redis for long, and a kill between two of them loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from gpuinfer import Client
from gpuinfer.queue import keys, returns
from gpuinfer.queue.claims import Claimed, Stray
from gpuinfer.queue.message import PREDICT, decode
from gpuinfer.queue.router import Router
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import BrokerSettings, QueueSettings
from tests.contract.conftest import begin, calls, ids, message, on, send, store_of

pytestmark = [pytest.mark.integration, on("redis-socket")]


def cut_after(calls: int, script: Callable[..., Any]) -> Callable[..., Any]:
    """Return a script that is killed before one of its calls."""
    left = [calls]

    def call(**given: Any) -> Any:
        if not left[0]:
            raise redis.ConnectionError("killed")
        left[0] -= 1
        return script(**given)

    return call


@pytest.mark.parametrize("size", [1000, 200_000], ids=["many", "large"])
def test_no_call_takes_much(store: Store, size: int) -> None:
    """A restore, and a release, of much that is in flight: a call takes 250 tasks or half a megabyte, which
    keeps Redis for 3 to 4 ms."""
    count = 20_000_000 // (size + 500)
    text = Submission(task=PREDICT, inputs=["x" * size], queue="realtime", model="digits").encode()
    for _ in range(count):
        store.client.lpush("realtime", text)
    held: list[Claimed] = []
    while len(held) < count:
        held += store.claim(500, search=True)
    least = max(count // returns.CALL_TASKS, count // (returns.CALL_BYTES // len(text) + 1))
    assert calls(store, store.take_back) >= least
    held = []
    while len(held) < count:
        held += store.claim(500)
    seqs = [task.seq for task in held]
    assert calls(store, lambda: store.release(seqs, ran=set(seqs[::2]))) >= least
    assert store.client.llen("realtime") == count


def test_a_restore_cut_off_between_two_calls(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran has one death on its account, whichever call it came in, and the order stands."""
    monkeypatch.setattr(returns, "CALL_TASKS", 3)
    wanted = send(store, 10)
    held = store.claim(10)
    begin(store, [held[1], held[8]])
    with monkeypatch.context() as patch:
        patch.setattr(store, "_restore", cut_after(2, store._restore))
        with pytest.raises(redis.ConnectionError):
            store.restore()
    assert store.client.hlen(store.inflight) == 2 * 4 + 1
    assert store.restore().returned == 4
    again = store.claim(10)
    assert ids(again) == wanted
    assert [decode(task.payload).deaths for task in again] == [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]


def test_a_restore_stops_when_another_one_begins(
    broker: BrokerSettings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each call the epoch is compared: what a new process claims meanwhile stays with it."""
    monkeypatch.setattr(returns, "CALL_TASKS", 2)
    wanted = send(store, 6)
    store.claim(6)
    after, real = store_of(broker), store._restore
    taken: list[Any] = []

    def late(**given: Any) -> Any:
        if not taken:
            after.restore()
            taken.extend(after.claim(6))
        return real(**given)

    monkeypatch.setattr(store, "_restore", late)
    with pytest.raises(Exception, match="taken over"):
        store.restore()
    assert ids(taken) == wanted
    assert store.client.hlen(store.inflight) == 12


def test_a_foreign_key_holds_its_own_tasks_alone(store: Store) -> None:
    """What stands under a list's name keeps that list's tasks in flight: others are put back, and claims go
    on. With the key gone, those come back, and a death is on the account of what ran."""
    raw: Any = store.client
    first, *rest = send(store, 3)
    held = store.claim(3)
    others = send(store, 2, queue="batch")
    held += store.claim(2)
    raw.set("realtime", "a stranger's")
    assert store.release([held[1].seq, held[3].seq]) == 1
    store.mark_uncertain()
    known = {task.seq for task in held if task not in (held[1], held[3])}
    assert store.reconcile(known) == 1
    assert not store.uncertain
    assert ids(store.claim(9)) == others[:1]
    begin(store, held[:1])
    assert store.restore().returned == 2
    assert store.restore().returned == 0
    assert ids(store.claim(9)) == others[::-1]  # the first one was claimed again, and so last
    assert store.client.hlen(store.inflight) == 2 * 5
    assert raw.get("realtime") == b"a stranger's"
    raw.delete("realtime")
    assert store.restore().returned == 5
    again = store.claim(9)
    assert ids(again) == [first, *rest, *others[::-1]]
    assert [decode(task.payload).deaths for task in again] == [1, 0, 0, 0, 0]


def test_what_cannot_be_passed_on_stays(store: Store) -> None:
    """A foreign key under the list of the model that a task is for."""
    raw: Any = store.client
    (task_id,) = send(store, 1)
    (task,) = store.claim(1)
    raw.set("realtime.other", "a stranger's")
    assert store.release([task.seq], models={task.seq: "other"}) == 0
    assert store.release([task.seq]) == 1
    stray = Stray(0, task.payload, "other")
    assert Router(store, QueueSettings()).route("realtime", 0, [stray]) == 0
    assert ids(store.claim(1)) == [task_id]


def test_a_release_cut_off_between_two_calls(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is in flight still; released again, all stand in their order, those passed on too."""
    monkeypatch.setattr(returns, "CALL_TASKS", 3)
    wanted = send(store, 8)
    held = store.claim(8)
    models = {task.seq: "other" for task in held[::2]}
    with monkeypatch.context() as patch:
        patch.setattr(store, "_release", cut_after(2, store._release))
        with pytest.raises(redis.ConnectionError):
            store.release([task.seq for task in held], models=models)
    assert store.release([task.seq for task in held], models=models) == 2
    assert ids(store.claim(8)) == wanted[1::2]
    raw: Any = store.client
    other = [decode(text).id for text in reversed(raw.lrange("realtime.other", 0, -1))]
    assert other == wanted[::2]
    claimed = {key.decode(): int(count) for key, count in raw.hgetall(keys.CLAIMED).items()}
    assert claimed == {"realtime digits": 4}


def test_what_is_no_message_is_put_back_too(store: Store, client: Client) -> None:
    """Bytes that are no object, and a payload without an id, stay as they are."""
    for text in (b"not json", b'{"headers": {}}', message()):
        store.client.lpush("realtime", text)
    held = store.claim(3, search=True)
    restored = store.restore()
    assert restored.returned == 3
    assert len(restored.ids) == 1
    assert store.claim(3)[0].payload == held[0].payload
