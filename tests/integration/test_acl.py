# SPDX-License-Identifier: Apache-2.0
"""Our Redis with its users: what a program must not do is refused, also when it was taken over."""

from __future__ import annotations

import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis.exceptions import NoPermissionError

from gpuinfer.queue import keys
from gpuinfer.queue.submission import Submission
from tests.brokers import OurRedis
from tests.workers import NAME, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.our_redis]


# -- what is refused ----------------------------------------------------------------------

TASK = Submission(task="gpuinfer.predict", inputs=[1], queue="realtime").encode().decode()
PIDBOX = "/0.celery.pidbox"
#: For nobody but the administrator.
ADMINS: list[tuple[str, ...]] = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("KEYS", "*"),
    ("DEBUG", "SLEEP", "0"),
    ("SHUTDOWN", "NOSAVE"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "me", "on"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("CLIENT", "LIST"),
    ("MONITOR",),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "FLUSH"),
    ("REPLICAOF", "NO", "ONE"),
    ("SAVE",),
    ("SWAPDB", "0", "1"),
    ("SLOWLOG", "GET"),
    ("MODULE", "LIST"),
    ("DBSIZE",),
    ("RANDOMKEY",),
    ("PUBLISH", PIDBOX, "{}"),
    ("DEL", "realtime"),
    ("UNLINK", "realtime"),
    ("SET", "realtime", "x"),
    ("RENAME", "realtime", "elsewhere"),
    ("EXPIRE", "realtime", "1"),
    ("LTRIM", "realtime", "1", "0"),
    ("DEL", keys.inflight(NAME)),
    ("HGETALL", keys.inflight(NAME)),
    ("HGETALL", keys.DEAD),
    ("DEL", keys.DEAD),
    ("EVAL", "return redis.call('DEL', 'realtime')", "0"),
    ("EVAL", "return redis.call('DEL', KEYS[1])", "1", "realtime"),
    ("SET", "anything", "else"),
]
REFUSED: dict[str, list[tuple[str, ...]]] = {
    "api": [
        ("SCAN", "0"),
        ("RPOP", "realtime"),
        ("RPOP", keys.list_key("realtime", 9)),
        ("BRPOP", "realtime", "1"),
        ("RPUSH", "realtime", TASK),
        ("LRANGE", "realtime", "0", "-1"),
        ("LMOVE", "realtime", "default", "LEFT", "RIGHT"),
        ("COPY", "realtime", "default"),
        ("ZRANGE", keys.later("realtime"), "0", "-1"),
        ("HGET", keys.inflight(NAME), "1"),
        ("HKEYS", keys.inflight(NAME)),
        ("HSET", keys.inflight(NAME), "1", "x"),
        ("SET", keys.heartbeat(NAME), "x"),
        ("HSET", keys.epoch(NAME), "number", "9"),
        ("HDEL", keys.epoch(NAME), "number"),
        ("HSET", keys.DEAD, "letter", "{}"),
        ("HGETALL", keys.DEAD),
        ("DEL", keys.result("1")),
        ("HDEL", keys.ENDED, "completed realtime digits"),
        ("HGETALL", keys.RATES),
        ("DEL", keys.RATES),
        ("DEL", keys.WEIGHTS),
        ("LRANGE", "realtime@alice", "0", "-1"),
        ("SET", keys.FORMAT_KEY, "9"),
        ("SET", keys.DEFAULT_MODEL, "x"),
        ("ZADD", keys.CATALOGUE, "1", "x"),
        ("ZREM", keys.CATALOGUE, "digits"),
        ("ZREM", keys.index(), "realtime"),
        ("SADD", "_kombu.binding.celery.pidbox", "x"),
        ("SUBSCRIBE", PIDBOX),
        ("PSUBSCRIBE", "*"),
        ("CLIENT", "UNBLOCK", "1"),
    ],
    "worker": [
        ("LPUSH", "bank", TASK),
        ("SCAN", "0"),
        ("BRPOP", "realtime", "1"),
        ("LMOVE", "realtime", "default", "LEFT", "RIGHT"),
        ("LSET", "realtime", "0", "x"),
        ("RENAME", keys.DEAD, keys.inflight(NAME)),
        ("SET", keys.inflight(NAME), "x"),
        ("DEL", keys.index()),
        ("DEL", keys.epoch(NAME)),
        ("HDEL", keys.epoch(NAME), "number"),
        ("DEL", keys.FORMAT_KEY),
        ("DEL", keys.ENDED),
        ("ZREM", keys.CATALOGUE, "digits"),
        ("HSET", "gpuinfer:watcher:hosts", "x", "1"),
        ("HGETALL", keys.KEYED),
        # Other callers' tasks, and what they may: not by pattern, and not as a whole.
        ("KEYS", f"{keys.RESULT_PREFIX}*"),
        ("SCAN", "0", "MATCH", f"{keys.RESULT_PREFIX}*"),
        ("PSUBSCRIBE", "*"),
        ("PSUBSCRIBE", f"{keys.RESULT_PREFIX}*"),
        ("PSUBSCRIBE", f"{keys.REPLY_PREFIX}*"),
        ("PSUBSCRIBE", "/*.celery.pidbox"),
        ("SUBSCRIBE", keys.result("1")),
        ("LRANGE", keys.HISTORY, "0", "-1"),
        ("HGETALL", keys.WEIGHTS),
        ("HKEYS", keys.WEIGHTS),
        ("HSCAN", keys.WEIGHTS, "0"),
        ("HSET", keys.WEIGHTS, "alice", "9"),
        ("HGETALL", keys.RATES),
        ("HGET", keys.RATES, "alice"),
        ("HGETALL", f"{keys.USAGE_PREFIX}1"),
    ],
    "watcher": [
        ("LPUSH", "bank", TASK),
        ("RPOP", "realtime"),
        ("BRPOP", "realtime", "1"),
        ("LINDEX", "realtime", "0"),
        ("SET", keys.heartbeat(NAME), "x"),
        ("DEL", keys.heartbeat(NAME)),
        ("DEL", keys.epoch(NAME)),
        ("DEL", keys.FORMAT_KEY),
        ("SET", keys.DEFAULT_MODEL, "x"),
        ("SCAN", "0"),
        ("LRANGE", "realtime", "0", "-1"),
        ("GET", keys.result("1")),
        ("DEL", keys.result("1")),
        ("SUBSCRIBE", PIDBOX),
        ("CLIENT", "UNBLOCK", "1"),
        ("RENAME", "gpuinfer:watcher:x", "realtime"),
        ("COPY", "realtime", "gpuinfer:watcher:x"),
        ("LMOVE", "realtime", "gpuinfer:watcher:x", "LEFT", "RIGHT"),
    ],
}


#: How Redis says it for a script's commands, and for those it is built without.
NO = re.compile("user executing the script can't|DEBUG command not allowed")


def contents(client: redis.Redis) -> dict[bytes, bytes | None]:
    """Return all there is."""
    return {key: client.dump(key) for key in client.scan_iter()}


@pytest.mark.parametrize("user", REFUSED)
def test_refused(redis_server: OurRedis, user: str) -> None:
    """An intruder in a program has no more than its own rights; every command has its refusal."""
    with redis_server.client() as admin:
        admin.lpush("realtime", TASK)
        admin.hset(keys.inflight(NAME), mapping={"1": TASK, "1:list": "realtime"})
        admin.hset(keys.DEAD, "letter", "{}")
        admin.hset(keys.epoch(NAME), "number", "3")
        before = contents(admin)
        allowed = []
        for command in ADMINS + REFUSED[user]:
            with redis_server.client(user) as own:
                try:
                    own.execute_command(*command)
                except redis.ResponseError as exc:
                    if isinstance(exc, NoPermissionError) or NO.search(str(exc)):
                        continue
                allowed.append(command)
        assert allowed == []
        assert contents(admin) == before
    assert redis_server.denied(), "and Redis notes it"


def test_a_worker_ends_its_own_wait(redis_server: OurRedis) -> None:
    """Of the commands on connections it has what that takes."""
    with redis_server.client("worker") as worker, redis_server.client("worker") as waiting:
        number = waiting.client_id()
        with ThreadPoolExecutor(1) as thread:
            waited = thread.submit(waiting.brpop, [keys.wake(NAME)], 120)
            wait_until(lambda: worker.execute_command("CLIENT", "UNBLOCK", number))
            assert waited.result() is None


def test_watchers_own_notes(redis_server: OurRedis) -> None:
    """The watcher keeps what it likes under its own prefix, whatever its kind."""
    with redis_server.client("watcher") as watcher:
        watcher.set("gpuinfer:watcher:a", 1, ex=60)
        watcher.hset("gpuinfer:watcher:hosts", mapping={"one": "{}"})
        watcher.zadd("gpuinfer:watcher:log", {"x": 1})
        watcher.lpush("gpuinfer:watcher:list", 1)
        watcher.expire("gpuinfer:watcher:hosts", 60)
        assert watcher.hgetall("gpuinfer:watcher:hosts") == {b"one": b"{}"}
        assert watcher.get(keys.heartbeat("a")) is None
        assert watcher.delete("gpuinfer:watcher:a") == 1


@pytest.mark.parametrize(
    ("user", "password"), [(None, None), (None, "admin-secret"), ("default", "x"), ("api", "worker-secret")]
)
def test_strangers(redis_server: OurRedis, user: str | None, password: str | None) -> None:
    """Who names no user, or not its password, is not let in; the default user is off."""
    guest = redis.Redis(unix_socket_path=str(redis_server.socket), username=user, password=password)
    with guest, pytest.raises(redis.RedisError, match=r"NOAUTH|WRONGPASS|[Aa]uthenticat|invalid username"):
        guest.ping()
    with redis_server.client() as admin:
        assert admin.acl_getuser("default")["enabled"] is False
    redis_server.denied()


def test_hello_tells_nothing(redis_server: OurRedis) -> None:
    """A connection without a login gets no answer but that one is needed."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(os.fspath(redis_server.socket))
        raw.settimeout(60)
        raw.sendall(b"INFO\r\n")
        assert raw.recv(200).startswith(b"-NOAUTH")


def test_more_users(redis_server: OurRedis) -> None:
    """Redis takes an administrator's own user after ours, as ``gpuinfer redis prepare`` writes it."""
    lines = (redis_server.folder / "users.acl").read_text(encoding="utf-8")
    (redis_server.folder / "users.acl").write_text(
        lines + "user app on >pw ~realtime* +lpush resetchannels\n", encoding="utf-8"
    )
    redis_server.stop()
    redis_server.start()
    with redis.Redis(unix_socket_path=str(redis_server.socket), username="app", password="pw") as app:
        app.lpush("realtime", "x")
