# SPDX-License-Identifier: Apache-2.0
"""What follows a task's end is sent by the call that takes the task out of flight, once, or ends itself."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Signature, chain, chord, group

from gpuinfer import Client
from gpuinfer.errors import ChainRefused, DeadLettered, InferenceError, TaskNotFound, TaskRevoked
from gpuinfer.queue import keys
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.message import Envelope, decode
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, QueueSettings
from gpuinfer.worker.outbox import Outbox
from tests.contract.conftest import begin, ids, on, store_of

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

ALLOWED = QueueSettings(ageing_s=0, chain_queues=("shop",))


@pytest.fixture
def store(broker: BrokerSettings) -> Store:
    return store_of(broker, settings=ALLOWED)


@pytest.fixture
def shop() -> Iterator[Celery]:
    """An application that sends chains; what it puts into our list is what any producer's Celery writes."""
    with Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        yield app


def predict(app: Celery, *args: Any, **options: Any) -> Signature:
    return app.signature("gpuinfer.predict", args or ([1],), queue="realtime", **options)


def send(app: Celery, canvas: Any, store: Store) -> Claimed:
    """Send a canvas as Celery does, and claim its first task."""
    canvas.apply_async()
    with app.connection_for_read() as connection:
        message = connection.default_channel._get("realtime")
    store.client.lpush("realtime", json.dumps(message))
    (task,) = store.claim(1, search=True)
    return task


def read(task: Claimed) -> Envelope:
    envelope = decode(task.payload)
    envelope.body()
    return envelope


def end(store: Store, task: Claimed, outcome: Any) -> Final:
    return Outbox(store).final(task, outcome, read(task))


def waiting(store: Store, name: str = "shop") -> list[tuple[dict[str, Any], list[Any]]]:
    """Return (headers, body) of what waits in a list, the first to be served in front."""
    found: Any = store.client.lrange(name, 0, -1)
    messages = [json.loads(text) for text in reversed(found)]
    return [(message["headers"], json.loads(b64decode(message["body"]))) for message in messages]


def test_a_successor_is_sent_once(store: Store, client: Client, shop: Celery) -> None:
    """It comes with the parent's result in front, its own arguments, and the rest of the chain; once."""
    second = shop.signature("shop.store", args=[7], kwargs={"a": 1}, queue="shop", time_limit=9)
    third = shop.signature("shop.tell", queue="shop")
    task = send(shop, chain(predict(shop, priority=5), second, third, app=shop), store)
    parent = decode(task.payload)
    final = end(store, task, {"class": 2})
    for _ in range(2):
        store.settle([final])
    ((headers, (args, kwargs, embed)),) = waiting(store)
    assert (args, kwargs) == ([{"class": 2}, 7], {"a": 1})
    assert headers["task"] == "shop.store"
    assert (headers["root_id"], headers["parent_id"]) == (parent.id, parent.id)
    assert headers["timelimit"] == [9, None]
    assert [part["task"] for part in embed["chain"]] == ["shop.tell"]
    assert client.result(parent.id) == {"class": 2}
    with pytest.raises(TaskNotFound):
        client.status(headers["id"])


def test_priorities_callbacks_and_groups(store: Store, shop: Celery) -> None:
    """Steps of priority are the consumer's; ``link`` and the tasks of a group are each sent."""
    linked = predict(shop)
    linked.link(shop.signature("shop.low", queue="shop", priority=2))
    linked.link(shop.signature("shop.high", queue="shop", priority=8, immutable=True))
    both = group(shop.signature("shop.one", queue="shop"), shop.signature("shop.two", queue="shop"), app=shop)
    linked.link(chain(shop.signature("shop.first", queue="shop"), shop.signature("shop.next"), app=shop))
    task = send(shop, linked, store)
    store.settle([end(store, task, 3)])
    assert [(headers["task"], body[0]) for headers, body in waiting(store)] == [
        ("shop.low", [3]),
        ("shop.first", [3]),
    ]
    assert [body[2]["chain"][0]["task"] for _, body in waiting(store)[1:]] == ["shop.next"]
    assert [(headers["task"], body[0]) for headers, body in waiting(store, f"shop{keys.SEP}6")] == [
        ("shop.high", [])
    ]
    store.client.delete("shop")
    task = send(shop, chain(predict(shop), both, app=shop), store)
    store.settle([end(store, task, 3)])
    found = waiting(store)
    assert [headers["task"] for headers, _ in found] == ["shop.one", "shop.two"]
    assert len({headers["group"] for headers, _ in found}) == 1


def test_a_successor_of_ours(broker: BrokerSettings, store: Store, client: Client, shop: Celery) -> None:
    """A prediction that follows goes to the list of its model, is waited for, and wakes who serves it."""
    other = store_of(broker, "gpu1@here", models=["resnet"])
    assert other.claim(1, state="idle") == []
    task = send(
        shop,
        chain(predict(shop), shop.signature("gpuinfer.predict", kwargs={"model": "resnet"}), app=shop),
        store,
    )
    store.settle([end(store, task, [5])])
    assert store.client.llen(keys.wake("gpu1@here")) == 1
    (following,) = other.claim(9)
    assert following.list_key == "realtime.resnet"
    assert read(following).body()[0] == [[5]]
    assert client.status(decode(following.payload).id).state == "queued"
    task = send(shop, chain(predict(shop), shop.signature("tasks.batch_predict"), app=shop), store)
    store.settle([end(store, task, [[1], [2]])])
    (following,) = store.claim(9)
    assert following.list_key == "batch"


@pytest.mark.parametrize(
    ("late", "words"),
    [(False, 1), (False, 20_000), (True, 1)],
    ids=["failed", "failed with many words", "cancelled while it ran"],
)
def test_what_follows_a_failure(store: Store, client: Client, shop: Celery, late: bool, words: int) -> None:
    """Successors do not run, and their callers hear so; errbacks get the id of what has failed."""
    first = predict(shop)
    first.link_error(shop.signature("shop.sorry", args=[1], queue="shop"))
    canvas = chain(first, shop.signature("shop.store"), shop.signature("shop.tell"), app=shop)
    result = canvas.freeze()
    task = send(shop, canvas, store)
    failed = decode(task.payload).id
    if late:
        store.settle([Final(None, failed, _revoked(failed))])
    final = end(store, task, 3 if late else InferenceError("broken" * words))
    for _ in range(2):
        store.settle([final])
    ((headers, (args, _, _)),) = waiting(store)
    assert (headers["task"], args, headers["parent_id"]) == ("shop.sorry", [failed, 1], failed)
    assert store.client.llen("celery") == 0
    for task_id in (result.id, result.parent.id):
        with pytest.raises(TaskRevoked if late else InferenceError):
            client.result(task_id, timeout_s=60)


def _revoked(task_id: str) -> bytes:
    from gpuinfer.queue import results

    return results.failure(task_id, TaskRevoked("no more"), worker="")


def test_cancelled_before_it_began(store: Store, client: Client, shop: Celery) -> None:
    """What was cancelled is taken out of flight without running; its errbacks are called then."""
    first = predict(shop)
    first.link_error(shop.signature("shop.sorry", queue="shop"))
    task = send(shop, first, store)
    task_id = decode(task.payload).id
    store.settle([Final(None, task_id, _revoked(task_id))])
    assert begin(store, [task]) == {0}
    envelope = read(task)
    skipped = Final(
        task.seq, "", b"", follows=store.chains.skipped(envelope, task.list_key), parent=envelope.id
    )
    for _ in range(2):
        store.settle([skipped], idle=True)
    assert [args for _, (args, _, _) in waiting(store)] == [[task_id]]
    assert not store.client.exists(store.inflight)


def test_buried(store: Store, client: Client, shop: Celery) -> None:
    """A dead letter is a failure: its errbacks are called, its successors end."""
    first = predict(shop)
    first.link_error(shop.signature("shop.sorry", queue="shop"))
    canvas = chain(first, shop.signature("shop.store"), app=shop)
    result = canvas.freeze()
    task = send(shop, canvas, store)
    for _ in range(2):
        store.bury(task.seq, task.list_key, task.payload, DeadLettered("its worker died"))
    assert [args for _, (args, _, _) in waiting(store)] == [[decode(task.payload).id]]
    with pytest.raises(DeadLettered):
        client.result(result.id, timeout_s=60)


def test_only_who_holds_a_task_ends_it(broker: BrokerSettings, client: Client, shop: Celery) -> None:
    """A worker taken for dead writes neither the result nor the successor: the next worker does both."""
    first, second = store_of(broker), store_of(broker, "gpu1@here")
    task = send(shop, chain(predict(shop), shop.signature("shop.store"), app=shop), first)
    late = end(first, task, "late")
    store_of(broker).restore()
    (again,) = second.claim(1)
    first.settle([late])
    assert second.client.llen("celery") == 0
    assert begin(second, [again]) == set()
    second.settle([end(second, again, "in time")])
    assert [args for _, (args, _, _) in waiting(second, "celery")] == [["in time"]]
    assert client.result(decode(again.payload).id) == "in time"


def test_refused_successors(store: Store, client: Client, shop: Celery) -> None:
    """Where a successor cannot go it ends as ``chain_refused``, with all behind it; its parent succeeds."""
    store.client.set("celery", "something else")
    refused = [
        (shop.signature("shop.store"), "celery"),
        (shop.signature("shop.store", queue="bank"), "celery, shop, but not 'bank'"),
        (shop.signature("shop.store", exchange="news", routing_key="x"), "exchange"),
    ]
    for successor, words in refused:
        canvas = chain(predict(shop), successor, shop.signature("shop.tell"), app=shop)
        result = canvas.freeze()
        task = send(shop, canvas, store)
        assert store.settle([end(store, task, 1)]) == {}
        assert client.result(decode(task.payload).id) == 1
        for task_id in (result.parent.id, result.id):
            with pytest.raises(ChainRefused, match=words):
                client.result(task_id, timeout_s=60)
    assert store.client.get("celery") == b"something else"
    assert not store.client.exists("bank", store.inflight)


def test_a_chord_is_refused(store: Store, client: Client, shop: Celery) -> None:
    """A chord that follows does not begin; who waits for its body hears so."""
    body = shop.signature("shop.sum")
    header = group([shop.signature("shop.one"), shop.signature("shop.two")], app=shop)
    canvas = chain(predict(shop), chord(header, body, app=shop), app=shop)
    result = canvas.freeze()
    task = send(shop, canvas, store)
    store.settle([end(store, task, 1)])
    with pytest.raises(ChainRefused, match=r"celery\.chord"):
        client.result(result.id, timeout_s=60)
    assert ids(store.claim(9, search=True)) == []
