# SPDX-License-Identifier: Apache-2.0
"""Our Redis's users have all rights that their scripts and calls need: nothing here is refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, get_args
from unittest.mock import ANY

import pytest
import redis

from gpuinfer import Client
from gpuinfer.client.aio import AsyncClient
from gpuinfer.errors import DeadLettered, TaskNotFound
from gpuinfer.metrics.gather import gather
from gpuinfer.metrics.recorder import Recorder
from gpuinfer.queue import catalogue, dead, format, heartbeats, keys, results, scripts, series, usage
from gpuinfer.queue.app import create_app
from gpuinfer.queue.claims import Claimed, Final, Want
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.epoch import REAPER
from gpuinfer.queue.later import Postponed
from gpuinfer.queue.message import decode
from gpuinfer.queue.orphans import holder, holders
from gpuinfer.queue.router import Router
from gpuinfer.queue.store import Store
from gpuinfer.queue.submission import Submission
from gpuinfer.queue.tally import Tally
from gpuinfer.settings import QUEUES, QueueSettings, Settings
from tests.brokers import OurRedis, our_redis

pytestmark = pytest.mark.integration

WORKER = "gpu0@test"


@pytest.fixture(scope="module")
def server() -> Iterator[OurRedis]:
    """One Redis for all tests here; each begins with an empty one. In the end nothing was refused."""
    with our_redis() as started:
        yield started


@pytest.fixture
def redis_server(server: OurRedis) -> OurRedis:
    with server.client() as admin:
        admin.flushall()
    return server


# -- what the scripts say -----------------------------------------------------------------

LISTS = ["realtime", "default.resnet@alice\x06\x169", "batch.resnet"]
#: Who runs each script.
RUN_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("claim", "begin", "settle", "release", "route", "register", "leave", "index"), ("worker",)
    ),
    **dict.fromkeys(("epoch", "restore", "bury", "due", "trim"), ("worker", "watcher")),
    "postpone": ("worker",),
    "describe": ("worker", "watcher"),
    "submit": ("api",),
    "cancel": ("api", "worker"),
    "put": ("api", "worker"),
    "depth": ("api", "worker", "watcher"),
    "revive": ("admin", "api"),
    "erase": ("api",),
    **dict.fromkeys(("purge", "pause", "drop"), ("admin",)),
    "drain": ("admin", "worker"),
    "tell": ("watcher",),
    "keep": ("watcher",),
    "know": ("watcher",),
    "forget": ("watcher",),
    "tidy": ("watcher",),
    **dict.fromkeys(("history", "origin", "known"), ("api",)),
    "account": ("api", "worker"),
    "record": ("watcher",),
}
#: The keys a script is given. What is not here is an in-flight hash, and an epoch as the second.
GIVEN: dict[str, list[list[str]]] = {
    "bury": [[keys.inflight(WORKER)]],
    "trim": [],
    "drop": [],
    "forget": [],
    "tidy": [],
    "history": [],
    "origin": [],
    "drain": [],
    "known": [],
    "account": [],
    "record": [],
    "erase": [[keys.result("1")]],
    "cancel": [[keys.result("1")]],
    "depth": [],
    "describe": [],
    "due": [],
    "pause": [],
    "purge": [LISTS, [keys.later("realtime")]],
    "epoch": [[keys.epoch(WORKER)]],
    "register": [[keys.heartbeat(WORKER)]],
    "leave": [[keys.heartbeat(WORKER)], [keys.inflight(WORKER)]],
    "index": [LISTS],
    "put": [LISTS],
    "route": [LISTS],
    "submit": [[keys.body("1")]],
    "revive": [LISTS],
    "tell": [["gpuinfer:watcher:hosts"]],
    "keep": [["gpuinfer:watcher:memory:test"], ["gpuinfer:watcher:decisions"]],
}
#: What a variable of the scripts names.
VARIABLES = {
    "keyed": [keys.KEYED],
    "body": [keys.body("1")],
    "key": [keys.result("1")],
    "list": LISTS,
    "list.key": LISTS,
    "inflight": [keys.inflight(WORKER)],
    "queue": LISTS,
    "set": [keys.later("realtime")],
    "index": [keys.index(), keys.index("resnet")],
    "named": [keys.index("resnet")],
    "name": [*LISTS, keys.index(), keys.later("realtime")],
    "idle": [keys.IDLE_PREFIX + "group"],
    "groups": [keys.GROUPS_PREFIX + "realtime.resnet"],
    "order": [keys.ORDER_PREFIX + "group"],
    "past": [keys.HISTORY, keys.FAILURES],
    "since": [keys.AGEING_PREFIX + "group"],
    "2": [keys.index(), keys.index("resnet")],
    "n": [keys.index(), keys.index("resnet")],
    "unpack": [keys.result("1")],
    "chunk": [keys.SERIES_PREFIX + "10:1:waiting"],
    "mark": [keys.FLUSHED_PREFIX + "1"],
    "hash": [keys.USAGE_PREFIX + "1", keys.COUNTS],
    "usage": [keys.USAGE_PREFIX + "1"],
    "channel": [keys.result("1"), keys.REPLY_PREFIX + "1"],
    "kept.letters": [keys.DEAD, keys.FAILED],
    "kept.ages": [keys.DEAD_AGES, keys.FAILED_AGES],
    "kept.bytes": [keys.DEAD_BYTES, keys.FAILED_BYTES],
    "kept": [keys.CLAIMED, keys.TURNS, keys.ROOM, keys.RATES],
    "'NUMSUB'": ["NUMSUB"],
    "'USAGE'": ["USAGE"],
    "'memory'": ["memory"],
}
IN_ONE_SCRIPT = {("claim", "ARGV[i]"): LISTS}
#: Command -> a call of it, around its key; what is not here takes the key alone.
CALLS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("HDEL", "HGET", "HMGET", "HEXISTS", "HSTRLEN", "LPUSH", "RPUSH", "SADD", "SREM", "SET"),
        ("{}", "x"),
    ),
    **dict.fromkeys(("PUBLISH", "RPOP", "ZREM", "ZSCORE"), ("{}", "1")),
    **dict.fromkeys(("GETRANGE", "LTRIM", "ZRANGE", "ZREVRANGE"), ("{}", "0", "1")),
    **dict.fromkeys(("ZCOUNT", "ZREMRANGEBYSCORE", "ZRANGEBYSCORE", "ZREVRANGEBYSCORE"), ("{}", "0", "1")),
    "SETRANGE": ("{}", "0", "x"),
    **dict.fromkeys(("HSET", "HSETNX", "HINCRBY"), ("{}", "x", "1")),
    "RENAME": ("{}", keys.result("1")),
    "EXPIRE": ("{}", "1"),
    **dict.fromkeys(("LINDEX", "HSCAN"), ("{}", "0")),
    "LREM": ("{}", "-1", "x"),
    "ZADD": ("{}", "1", "x"),
    **dict.fromkeys(("ZREMRANGEBYRANK", "LRANGE"), ("{}", "0", "1")),
    "ZUNION": ("2", "{}", "{}"),
    "ZCOUNT": ("{}", "0", "1"),
    "PUBSUB": ("{}", "channel"),
    "MEMORY": ("{}", "realtime"),
}
#: The same, in one script.
IN_THIS = {("submit", "RENAME"): ("{}", keys.KEYED_BEFORE)}
#: What they keep is always kept.
NEVER = {(script, call) for script in ("cancel", "bury") for call in ("DEL", "STRLEN", "RENAME", "GET")}
#: It leaves what has ended as it is.
NEVER.add(("cancel", "EXPIRE"))
_CALL = re.compile(r"redis\.p?call\('([A-Z]+)'(?=(?:, ([^,\n]*))?)")


def keys_of(script: str, expression: str) -> list[str]:
    """Return samples of the keys that an expression of a script names."""
    expression = expression.strip()
    word = re.match(r"KEYS\[(\d)\]|[A-Z_]+(?=\W|$)|[\w.\[\]']+", expression)
    assert word, f"{script}: which key is {expression!r}?"
    if word[1]:
        default = [[keys.inflight(WORKER)], [keys.epoch(WORKER)]]
        return GIVEN.get(script, default)[int(word[1]) - 1]
    name = re.match(r"[\w.\[\]']+", expression)
    assert name
    found = IN_ONE_SCRIPT.get((script, name[0])) or VARIABLES.get(name[0])
    if found:
        return found
    constant = scripts._CONSTANTS.get(word[0])
    assert isinstance(constant, str), f"{script}: which key is {expression!r}? Tell this test, and acl.py"
    return [f"{constant}x" if constant.endswith((":", "-")) else constant]


def calls_of(script: scripts.Name) -> Iterator[list[str]]:
    """Yield each call of Redis that a script may make, with samples of its keys."""
    for command, expression in _CALL.findall(scripts.code(script)):
        if (script, command) in NEVER:
            continue
        if not expression:
            yield [command]
            continue
        for key in keys_of(script, expression):
            yield [
                command,
                *(part.format(key) for part in IN_THIS.get((script, command)) or CALLS.get(command, ("{}",))),
            ]


def test_every_script_is_somebodys() -> None:
    """A new script is run by a user, and this test says by whom."""
    assert {name for name in get_args(scripts.Name) if name not in RUN_BY} == set()
    files = {
        file.name.removesuffix(".lua")
        for file in resources.files(scripts.__package__).joinpath("lua").iterdir()
    }
    libraries = {
        "again",
        "ageing",
        "chain",
        "clock",
        "dead",
        "ends",
        "keyed",
        "later",
        "lists",
        "payload",
        "places",
        "quota",
        "room",
        "states",
    }
    assert files - set(RUN_BY) == libraries


@pytest.mark.parametrize("script", get_args(scripts.Name))
def test_a_user_may_all_that_its_script_does(redis_server: OurRedis, script: scripts.Name) -> None:
    """Whichever way a script takes, no call in it is refused to the user who runs it."""
    refused = []
    with redis_server.client() as admin:
        for user in RUN_BY[script]:
            given = GIVEN.get(script, [[keys.inflight(WORKER)], [keys.epoch(WORKER)]])
            calls = [["EVALSHA", "0" * 40, "1", key] for samples in given for key in samples]
            for call in [*calls, *calls_of(script)]:
                answer: Any = admin.execute_command("ACL", "DRYRUN", user, *call)
                if answer != b"OK":
                    refused.append((user, *call, answer))
    assert refused == []


# -- what the programs do -----------------------------------------------------------------


def settings(server: OurRedis, user: str, **queue: object) -> Settings:
    return Settings.model_validate({"broker": server.login(user), "queue": queue})


def worker(client: redis.Redis, models: tuple[str, ...] = ("digits",), **queue: object) -> Store:
    store = Store(client, WORKER, QUEUES, QueueSettings.model_validate(queue), models=models)
    store.restore()
    store.register(b'{"state":"idle"}', default="digits")
    return store


def final(task: Claimed, *, keep: bool = True) -> Final:
    envelope = decode(task.payload)
    meta = results.success(envelope.id, 1, worker=WORKER)
    label = "completed realtime digits"
    return Final(task.seq, envelope.id, meta, keep=keep, reply=envelope.reply_to, label=label)


def plain(model: str | None = None) -> bytes:
    """Return a task as a plain producer appends it."""
    return Submission(task="gpuinfer.predict", inputs=[1], queue="realtime", model=model).encode()


def test_api(redis_server: OurRedis) -> None:
    """Submit, look, cancel, wait: by both clients and by Celery."""
    with redis_server.client("worker") as own:
        store = worker(own)
        assert store.claim(1, state="idle") == []  # it is idle: a submission wakes it
        with Client(settings(redis_server, "api")) as client:
            ids = [client.submit([1]), *client.submit_many([[1]] * 3, priority=9, queue="batch")]
            assert client.submit([1], idempotency_key="k") == client.submit([1], idempotency_key="k")
            assert client.cancel(ids[0])
            store.settle([final(task) for task in store.claim(100)])
            assert len(client.results(ids[1:], timeout_s=60)) == 3
            with pytest.raises(TaskNotFound):
                client.status("nothing")
    with redis_server.client("api") as client_of_api:
        assert read_depth(client_of_api).default_model == "digits"
        assert heartbeats.fresh(client_of_api)
    asyncio.run(asynchronously(settings(redis_server, "api")))
    for user in ("api", "worker", "admin"):
        with create_app(settings(redis_server, user)) as app:
            app.send_task("gpuinfer.predict", [[1]], queue="realtime", priority=4)
    with redis_server.client() as admin:
        assert admin.llen(keys.list_key("realtime", 4)) == 3


async def asynchronously(chosen: Settings) -> None:
    async with AsyncClient(chosen) as client:
        await client.ping()
        task = await client.submit([1])
        waiting = asyncio.ensure_future(client.wait(task, 60))
        assert await client.cancel(task)
        assert (await waiting).state == "revoked"


def test_worker(redis_server: OurRedis) -> None:
    """Claim, begin, settle, release, pass on, restore, bury, leave."""
    with redis_server.client("worker") as own, Client(settings(redis_server, "api")) as client:
        store = worker(own, ("digits", "resnet"), ageing_s=0.001, max_deaths=2)
        for model, queue in (("digits", "realtime"), ("resnet", "realtime"), ("digits", "batch")) * 3:
            client.submit([1], model=model, queue=queue)  # type: ignore[arg-type]
        with redis_server.client() as admin:
            admin.lpush("realtime", plain(), plain("resnet"), plain("unheard"))
            admin.lpush("default", plain())
        own_seq = store.claim(1)[0].seq
        assert store.postpone([(own_seq, 4e9)]) == Postponed(frozenset(), frozenset(), ANY)
        with redis_server.client() as admin:
            (list_key,) = admin.zrange(keys.LATER, 0, -1)
            admin.zadd(
                keys.later(list_key.decode()), {admin.zrange(keys.later(list_key.decode()), 0, 0)[0]: 1}
            )
            admin.zadd(keys.LATER, {list_key: 1})
            admin.set(keys.DUE, 1)
        assert store.waits()
        assert own.get(keys.DUE) is None
        assert store.plain.index() >= 2
        assert catalogue.unknown(store.client, ["digits", "nothing"]) == ("nothing",)
        while tasks := store.claim(
            {"digits": Want(2), "resnet": Want(1)}, begin=True, search=True, state="idle"
        ):
            store.begin([(task.seq, decode(task.payload).id, b"{}") for task in tasks])
            first, *rest = tasks
            store.settle([final(first, keep=first.seq % 2 == 0)], idle=True)
            store.release([task.seq for task in rest[:1]], [task.seq for task in rest[:1]])
            if rest:
                break
        store.wake()
        assert store.end_wait(own.client_id()) in (True, False)
        tasks = store.claim(1, state="busy") or store.claim(1)
        store.release([task.seq for task in tasks], models={task.seq: "other" for task in tasks})
        store.mark_uncertain()
        assert store.reconcile(()) >= 0
        store.claim(1, begin=True)
        assert holder(own, WORKER).tasks
        for task in store.claim(1):
            store.bury(task.seq, task.list_key, task.payload, DeadLettered("cannot be read"))
        restored = None
        while restored is None or not restored.dead:
            tasks = store.claim(1)
            assert tasks
            store.begin([(task.seq, decode(task.payload).id, b"") for task in tasks])
            restored = store.restore()
        assert restored.dead
        store.rejoin()
        format.establish(own)
        store.leave()
        with redis_server.client() as admin:
            assert admin.hlen(keys.DEAD) >= 2


def test_a_group_that_is_gone(redis_server: OurRedis) -> None:
    """The next heartbeat forgets a group that nobody has renewed, and what was kept for it."""
    kept = [prefix + "gone" for prefix in (keys.ORDER_PREFIX, keys.AGEING_PREFIX, keys.IDLE_PREFIX)]
    groups = keys.GROUPS_PREFIX + "realtime.digits"
    with redis_server.client("worker") as own, redis_server.client() as admin:
        store = worker(own)
        admin.zadd(groups, {"gone": 1})
        for key in kept:
            admin.zadd(key, {"x": 1})
        store.register()
        assert admin.zrange(groups, 0, -1) == [store.group.encode()]
        assert admin.exists(*kept) == 0


def test_router(redis_server: OurRedis) -> None:
    """A worker that does not serve the default model passes on what is for others, or for none."""
    with redis_server.client("worker") as own, redis_server.client() as admin:
        store = worker(own, ("resnet",))
        admin.set(keys.DEFAULT_MODEL, "digits")
        admin.lpush("realtime", plain("nosuch"), plain("resnet"), plain())
        assert Router(store, QueueSettings()).pass_on() == 2
        assert len(store.claim(10)) == 1


def test_watcher(redis_server: OurRedis) -> None:
    """It sets the format number, counts, and puts back or buries what a dead worker left."""
    with redis_server.client("watcher") as own, redis_server.client("worker") as theirs:
        format.establish(own)
        with Client(settings(redis_server, "api")) as client:
            ids = client.submit_many([[1]] * 3)
            for deaths in (1, 2):
                tasks = worker(theirs).claim(3)
                first = tasks[0]
                store = Store(theirs, WORKER, QUEUES, QueueSettings())
                store.begin([(first.seq, ids[0], results.started(ids[0], WORKER, 1))])
                assert read_depth(own).inflight == {WORKER: 3}
                assert [one.worker for one in holders(own)] == [WORKER]
                assert heartbeats.fresh(own)
                reaper = Store(own, WORKER, QUEUES, QueueSettings(), by=f"{REAPER} watcher@test")
                done = reaper.take_back()
                assert (done.returned, done.dead) == ((3, ()) if deaths == 1 else (2, (ids[0],)))
            assert client.status(ids[0]).state == "failed"


def test_administrator(redis_server: OurRedis) -> None:
    """Dead letters are the administrator's to read; a worker can drop some, when there are too many."""
    with redis_server.client("worker") as own, redis_server.client() as admin:
        store = worker(own)
        admin.lpush("realtime", plain())
        (task,) = store.claim(1, search=True)
        letter = store.bury(task.seq, task.list_key, task.payload, DeadLettered("x"))
        with pytest.raises(redis.ResponseError):
            own.hget(keys.DEAD, letter)
        redis_server.denied()
        dead.retry(admin, letter)
        assert len(store.claim(1)) == 1


def tables() -> Mapping[str, Any]:
    """Return what is unused of this test's own tables: it names no script or variable that is gone."""
    calls = [call for name in get_args(scripts.Name) for call in _CALL.findall(scripts.code(name))]
    used = {expression.strip() for _, expression in calls}
    return {"variables": [name for name in VARIABLES if not any(part.startswith(name) for part in used)]}


def test_the_tables_are_as_the_scripts() -> None:
    """No table above names what is gone."""
    assert tables() == {"variables": []}
    assert set(GIVEN) <= set(RUN_BY)


def test_accounts_metrics_and_history(redis_server: OurRedis) -> None:
    """The front and workers add up, watchers write the history, people read both; no worker reads any."""
    with redis_server.client("worker") as client:
        store = worker(client, models=("digits", "resnet"))
        tally = Tally()
        tally.use("device_us", "alice", "resnet", 5)
        tally.count("device_us", "alice", "resnet", count=5)
        store.account(tally.args())
        refused = (keys.COUNTS, keys.KEY_USED, f"{keys.USAGE_PREFIX}{int(client.time()[0]) // 3600}")
        for name in refused:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.hgetall(name)
    assert [line.split()[0] for line in redis_server.denied()] == ["worker"] * len(refused)

    async def counted() -> usage.Usage:
        async with AsyncClient(settings(redis_server, "api")) as front:
            await front.submit([1], model="resnet")
            tally = Tally()
            tally.use("requests", "alice", "resnet", 1)
            tally.used.add("alice")
            await front.account(tally.args())
            return await front.usage()

    (account,) = asyncio.run(counted()).accounts
    assert (account.key, account.requests, account.device_us) == ("alice", 1, 5)
    with redis_server.client("watcher") as client:
        Recorder(client, "a").step(["a"])
        assert series.names(client)
    for user in ("api", "operator", "viewer", "watcher"):
        with redis_server.client(user) as client:
            assert gather(client).depth.total_waiting == 1
            assert usage.read(client).accounts == (account,)
            found = series.read(client, ["waiting"], 60)
            assert [value for value in found.values["waiting"] if value is not None] == [1]
    assert redis_server.denied() == []
