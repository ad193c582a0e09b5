# SPDX-License-Identifier: Apache-2.0
"""The end of a task is written whole or not at all, whatever right or type stands against it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
import redis
from structlog.testing import capture_logs

from gpuinfer.client.calls import one
from gpuinfer.client.origin import Origin
from gpuinfer.errors import DeadLettered
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Claimed, Final
from gpuinfer.queue.message import decode
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import QUEUES, QueueSettings
from gpuinfer.worker.outbox import Outbox
from tests.brokers import OurRedis, our_redis

pytestmark = pytest.mark.integration

WORKER = "gpu0@test"
LABEL = "completed realtime digits"


@pytest.fixture(scope="module")
def server() -> Iterator[OurRedis]:
    with our_redis() as started:
        yield started


@pytest.fixture
def admin(server: OurRedis) -> Iterator[redis.Redis]:
    """The administrator of an empty Redis; what a test was refused is not asked for."""
    with server.client() as client:
        client.flushall()
        yield client
        server.denied()


def claimed(admin: redis.Redis, store: Store, count: int) -> tuple[Origin, list[Claimed]]:
    """Submit tasks as one client does, and claim them; return where that client hears of their ends."""
    origin, settings = Origin(), QueueSettings()
    for _ in range(count):
        task = Submission(
            task="gpuinfer.predict", inputs=[1], queue="realtime", id=origin.new_id(), reply_to=origin.channel
        )
        bind(admin, "submit")(args=one(task, settings).args)
    tasks = store.claim(count)
    assert len(tasks) == count
    return origin, tasks


def store_of(client: redis.Redis) -> Store:
    store = Store(client, WORKER, QUEUES, QueueSettings(), models=("digits",))
    store.register(default="digits")
    return store


def final(task: Claimed, *, keep: bool = True) -> Final:
    envelope = decode(task.payload)
    meta = results.success(envelope.id, task.seq, worker=WORKER)
    return Final(task.seq, envelope.id, meta, keep=keep, reply=envelope.reply_to, label=LABEL)


def state(admin: redis.Redis) -> dict[bytes, Any]:
    """Return all that there is."""
    read: dict[Any, Any] = {
        b"string": admin.get,
        b"hash": admin.hgetall,
        b"list": lambda key: admin.lrange(key, 0, -1),
        b"set": admin.smembers,
        b"zset": lambda key: admin.zrange(key, 0, -1, withscores=True),
    }
    return {key: read[admin.type(key)](key) for key in admin.scan_iter()}


def listen(client: redis.Redis, *channels: str) -> Any:
    """Return subscriptions that stand."""
    heard = client.pubsub()  # type: ignore[no-untyped-call]
    heard.subscribe(*channels)
    for _ in channels:
        message = heard.get_message(timeout=60)
        assert message is not None
        assert message["type"] == "subscribe"
    return heard


#: How our scripts, and Redis, say it.
REFUSED = re.compile(r"may not run|can't run|can't access|no permissions|NOPERM")
#: What one user lacks -> how its rules are changed.
LACKING = {
    "a result's key": ["clearselectors", "(+@all ~gpuinfer:* ~realtime*)"],
    "to write results": [
        "clearselectors",
        "(+@all ~gpuinfer:* ~realtime*)",
        "(+get +getrange ~celery-task-meta-*)",
    ],
    "to drop results": [
        "clearselectors",
        "(+@all ~gpuinfer:* ~realtime*)",
        "(+set +getrange ~celery-task-meta-*)",
    ],
    "a client's channel": ["resetchannels", "&celery-task-meta-*"],
    "a task's channel": ["resetchannels", "&gpuinfer:reply:*"],
    "to ask who listens": ["-pubsub|numsub"],
    "the counters": [
        "clearselectors",
        "(+@all ~celery-task-meta-* ~gpuinfer:inflight:* ~gpuinfer:dead ~gpuinfer:index* ~realtime*)",
    ],
    "its in-flight hash": [
        "clearselectors",
        "(+@all ~celery-task-meta-* ~gpuinfer:ended)",
        "(+hexists ~gpuinfer:*)",
    ],
}


@pytest.fixture
def lacking(server: OurRedis, admin: redis.Redis, request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """A client of a user that lacks one right of a worker."""
    given = "reset on >secret -@all +eval +evalsha +script|load +auth +hello +time +publish +pubsub|numsub ~*"
    given += f" &{keys.RESULT_PREFIX}* &{keys.REPLY_PREFIX}*"
    rules = [*given.split(), "(+@all -pubsub ~*)", *LACKING[request.param]]
    admin.execute_command("ACL", "SETUSER", "lacking", *rules)  # type: ignore[no-untyped-call]
    client = redis.Redis(unix_socket_path=str(server.socket), username="lacking", password="secret")
    yield client
    client.close()
    admin.acl_deluser("lacking")


@pytest.mark.parametrize("lacking", LACKING, indirect=True)
@pytest.mark.parametrize("how", ["settle", "bury"])
def test_a_right_that_is_missing(admin: redis.Redis, lacking: redis.Redis, how: str, request: Any) -> None:
    """A worker that may not do all of it does nothing of it: no final state, no count, still in flight."""
    theirs = store_of(admin)
    _, tasks = claimed(admin, theirs, 3)
    before = state(admin)
    store = Store(lacking, WORKER, QUEUES, QueueSettings())
    with pytest.raises(redis.ResponseError, match=REFUSED):
        if how == "settle":
            store.settle([final(task, keep=task is not tasks[1]) for task in tasks], idle=True)
        elif request.node.callspec.params["lacking"] == "to drop results":  # that is not needed for it
            raise redis.ResponseError("NOPERM")
        else:
            task = tasks[0]
            store.bury(task.seq, task.list_key, task.payload, DeadLettered("x"))
    assert state(admin) == before
    assert theirs.settle([final(task) for task in tasks]) == {}  # who may does it, later
    assert admin.hgetall(keys.ENDED)[LABEL.encode()] == b"3"
    assert not admin.exists(keys.inflight(WORKER))


@pytest.mark.parametrize("key", [keys.ENDED, keys.inflight(WORKER), keys.DEAD])
def test_a_key_of_ours_that_is_of_another_type(admin: redis.Redis, key: str) -> None:
    """Where the counters, the dead letters or what is in flight is no hash, nothing ends by half."""
    store = store_of(admin)
    _, tasks = claimed(admin, store, 1)
    admin.delete(key)
    admin.set(key, "mine")
    before = state(admin)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        if key == keys.DEAD:
            store.bury(tasks[0].seq, tasks[0].list_key, tasks[0].payload, DeadLettered("x"))
        else:
            store.settle([final(tasks[0])])
    assert state(admin) == before


def test_a_result_that_is_none(server: OurRedis, admin: redis.Redis) -> None:
    """Something else stands under a result's name: its client is told, its neighbours are settled."""
    with server.client("worker") as own, server.client("api") as listener:
        store = store_of(own)
        origin, tasks = claimed(admin, store, 3)
        foreign = decode(tasks[1].payload).id
        admin.delete(keys.result(foreign))
        admin.rpush(keys.result(foreign), "mine")
        heard = listen(listener, origin.channel, keys.result(foreign))
        outbox = Outbox(store)
        with capture_logs() as logs:
            outbox.settle([final(task) for task in tasks], idle=True)
        messages = [message for _ in range(2) if (message := heard.get_message(timeout=60))]
        heard.close()
    told = {message["channel"].decode(): orjson.loads(message["data"]) for message in messages}
    assert [meta["task_id"] for meta in told[origin.channel]] == [decode(task.payload).id for task in tasks]
    assert told[keys.result(foreign)]["result"] == tasks[1].seq
    assert outbox.unsettled == []
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert (line["event"], line["task_id"]) == ("result_not_kept", foreign)
    assert "WRONGTYPE" in line["reason"]
    assert keys.result(foreign) in line["hint"]
    assert admin.lrange(keys.result(foreign), 0, -1) == [b"mine"]
    assert not admin.exists(keys.inflight(WORKER))
    assert admin.hget(keys.ENDED, LABEL) == b"3"
    for task in (tasks[0], tasks[2]):
        meta = admin.get(keys.result(decode(task.payload).id))
        assert meta is not None
        assert orjson.loads(meta)["status"] == "SUCCESS"


def test_another_channel(admin: redis.Redis) -> None:
    """What does not begin as a client's channel is not spoken on."""
    store = store_of(admin)
    _, (task,) = claimed(admin, store, 1)
    heard = listen(admin, "/0.celery.pidbox", keys.result(decode(task.payload).id))
    end = final(task)
    store.settle([Final(end.seq, end.task_id, end.meta, reply="/0.celery.pidbox", label=LABEL)])
    message = heard.get_message(timeout=60)
    assert message is not None
    assert message["channel"].decode() == keys.result(end.task_id)
    heard.close()
