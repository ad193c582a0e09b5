# SPDX-License-Identifier: Apache-2.0
"""What the scripts note of tasks that have ended, and what is forgotten on request."""

from __future__ import annotations

import time
import uuid

import pytest

from gpuinfer import Client
from gpuinfer.errors import QueueFull, ResultGone, TaskFailed, TaskNotFound, WrongState
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Final
from gpuinfer.queue.message import decode
from gpuinfer.queue.resource import Place
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, Settings
from tests.contract.conftest import done

pytestmark = pytest.mark.integration


def labelled(final: Final, label: str = "completed realtime digits") -> Final:
    return final._replace(label=label)


def test_the_newest_first_page_by_page(store: Store, client: Client) -> None:
    """Each end once, in its order, whether it came alone or with others; by model, state and page."""
    ids = client.submit_many([[1]] * 5)
    claimed = store.claim(10)
    store.settle([labelled(done(claimed[0]))])
    store.settle([labelled(done(task)) for task in claimed[1:4]])
    meta = results.failure(ids[4], TaskFailed("it failed"), worker="w")
    last = Final(claimed[4].seq, ids[4], meta, label="failed realtime digits")
    store.settle([last], idle=True)
    store.settle([last], idle=True)  # an answer was lost
    waits = client.submit([1])
    client.cancel(waits)
    page = client.tasks(limit=4)
    assert [task.id for task in page.tasks] == [waits, *reversed(ids[2:])]
    assert page.before is not None
    rest = client.tasks(before=page.before)
    assert ([task.id for task in rest.tasks], rest.before) == (ids[1::-1], None)
    (failed,) = client.tasks(status="failed", model="digits").tasks
    assert (failed.id, failed.error, failed.queue) == (ids[4], "task_failed", "realtime")
    assert client.tasks(model="other").tasks == []
    assert [task.id for task in client.tasks(status="cancelled").tasks] == [waits]


def test_it_is_bounded(store: Store, client: Client) -> None:
    """The oldest go, a thousand at a time; no long id is noted; what is no list harms nothing."""
    store.client.rpush(keys.HISTORY, *["1 completed\nold\n"] * (keys.HISTORY_MOST + keys.HISTORY_SLACK))
    client.submit([1])
    (task,) = store.claim(1)
    store.settle([done(task)])
    assert store.client.llen(keys.HISTORY) == keys.HISTORY_MOST
    store.settle([Final(None, "i" * 201, results.success("i", 1, worker="w"))])
    assert store.client.llen(keys.HISTORY) == keys.HISTORY_MOST
    store.client.set(keys.HISTORY, "text")
    client.submit([1])
    (task,) = store.claim(1)
    store.settle([done(task)])
    assert client.status(decode(task.payload).id).state == "completed"


def test_forget(store: Store, client: Client) -> None:
    """What has ended is deleted; what has not, or whose message still waits, is not."""
    with pytest.raises(TaskNotFound):
        client.forget("nobody")
    task_id = client.submit([1])
    with pytest.raises(WrongState, match="cancel it first"):
        client.forget(task_id)
    client.cancel(task_id)
    with pytest.raises(WrongState, match="message still waits"):
        client.forget(task_id)
    other = client.submit([1])
    task = store.claim(2)[-1]
    store.settle([done(task)])
    client.forget(other)
    assert store.client.exists(keys.result(other)) == 0
    with pytest.raises(ResultGone):
        client.status(other)
    with pytest.raises(ResultGone):
        client.forget(other)


def test_expired_or_unknown(store: Store, client: Client, broker: BrokerSettings) -> None:
    """A task of another client process that is gone is told from one that never was, and not waited for."""
    with Client(Settings(broker=broker)) as first:
        task_id = first.submit([1])
    (task,) = store.claim(1)
    store.settle([done(task)])
    store.client.delete(keys.result(task_id))
    for look in (client.status, client.forget, client.retry):
        with pytest.raises(ResultGone):
            look(task_id)
    with pytest.raises(ResultGone):
        client.wait(task_id, timeout_s=60)
    assert client.cancel(task_id) is False
    assert store.client.exists(keys.result(task_id)) == 0
    with pytest.raises(TaskNotFound) as unknown:
        client.status(str(uuid.uuid4()))
    assert type(unknown.value) is TaskNotFound


def test_known_processes_are_bounded(store: Store, broker: BrokerSettings) -> None:
    """The newest are remembered, also by a Redis that is full; a process says it once."""
    store.client.zadd(keys.ORIGINS, {f"{number:012x}": number for number in range(keys.ORIGINS_MOST)})
    store.client.config_set("maxmemory", "1")
    with Client(Settings(broker=broker)) as other:
        for _ in range(2):
            with pytest.raises(QueueFull):
                other.submit([1])
        assert other._origin.to_tell() is False
        newest = store.client.zrange(keys.ORIGINS, -1, -1)
        assert newest == [other._origin.prefix.encode()]
    store.client.config_set("maxmemory", "0")
    assert store.client.zcard(keys.ORIGINS) == keys.ORIGINS_MOST


def test_retry(store: Store, client: Client) -> None:
    """A dead letter waits again, under its id; nothing else has inputs to be sent again."""
    task_id = client.submit([1])
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, TaskFailed("it killed two workers"))
    assert [one.status for one in client.tasks(status="failed").tasks] == ["failed"]
    client.retry(task_id)
    assert client.status(task_id).state == "queued"
    with pytest.raises(WrongState, match="nothing to retry"):
        client.retry(task_id)
    (task,) = store.claim(1)
    store.settle([done(task)])
    with pytest.raises(WrongState, match="only a failed task"):
        client.retry(task_id)
    task_id = client.submit([1])
    (task,) = store.claim(1)
    store.bury(task.seq, task.list_key, task.payload, TaskFailed("it killed two workers"))
    client.forget(task_id)
    assert store.client.hlen(keys.DEAD) == 0


def test_a_task_as_the_front_shows_it(store: Store, client: Client) -> None:
    """With its place while it waits, with its result and metrics in the end."""
    client.submit([1])
    task_id = client.submit([1], metadata={"user": "7"})
    waits = client.task(task_id)
    assert (waits["status"], waits["position"], waits["metadata"]) == ("queued", 2, {"user": "7"})
    for task in store.claim(2):
        store.settle([done(task)])
    ended = client.task(task_id)
    assert (ended["status"], ended["result"], ended["urls"]["self"]) == ("completed", 1, f"/tasks/{task_id}")
    assert "position" not in ended


def place(client: Client, task_id: str) -> Place | None:
    return client.place(client.status(task_id))


def test_what_waits_tells_of_itself(store: Store, client: Client) -> None:
    """Its queue, model, priority, metadata and times while it waits, as its message has them."""
    store.register(default="digits")
    before = time.time()
    task_id = client.submit([1], priority=3, expires_s=60, metadata={"user": "é\n"}, queue="batch")
    status = client.status(task_id)
    expires = status.about.pop("expires")  # type: ignore[attr-defined]
    assert 59 < expires - before < 120
    assert status.about == {
        "queue": "batch",
        "model": "digits",
        "priority": 3,
        "metadata": {"user": "é\n"},
        "place": [1, -1, 0, 1],
    }
    (task,) = store.claim(1)
    assert decode(task.payload).sent_at == status.sent_at


def test_positions(store: Store, client: Client) -> None:
    """Each in its list, by what is claimed and put back; a model's own list has its own; many in one call."""
    store.register(default="digits")
    ids = client.submit_many([[1]] * 3)
    last = client.submit([1])
    other = client.submit([1], priority=1)
    assert [place(client, one) for one in (*ids, last, other)] == [Place(n) for n in (1, 2, 3, 4, 1)]
    claimed = store.claim(3)  # the other one first, for its priority
    assert [task.list_key for task in claimed] == ["realtime\x06\x161", "realtime", "realtime"]
    found = [place(client, one) for one in (*ids, last, other)]
    assert [one.position for one in found if one] == [0, 0, 1, 2, 0]
    assert all(one and one.starts_at for one in found[:4])
    store.release([task.seq for task in claimed])
    assert [place(client, one) for one in (*ids, last, other)] == [Place(n) for n in (1, 2, 3, 4, 1)]
    store.claim(3)
    again = client.submit([1])
    assert place(client, again) == Place(3)


def test_no_position(store: Store, client: Client) -> None:
    """What waits for its time has none, nor what has ended."""
    later = client.submit([1], countdown_s=60)
    assert client.status(later).about["queue"] == "realtime"
    assert place(client, later) is None
    task_id = client.submit([1])
    (task,) = store.claim(1)
    store.settle([done(task)])
    assert place(client, task_id) is None
