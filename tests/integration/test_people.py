# SPDX-License-Identifier: Apache-2.0
"""People who are not root: operators and viewers in our Redis; and a password that is changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from gpuinfer.broker import acl, passwords, rotation
from gpuinfer.client import Client
from gpuinfer.errors import BrokerRefused, ConfigError
from gpuinfer.queue import keys
from gpuinfer.settings import BrokerSettings, Settings
from tests.brokers import PASSWORDS, OurRedis, our_redis

pytestmark = pytest.mark.integration

PIDBOX = "/0.celery.pidbox"


@pytest.fixture
def server() -> Iterator[OurRedis]:
    with our_redis() as running:
        with running.client() as admin:
            admin.set(keys.FORMAT_KEY, keys.FORMAT)
            admin.set(keys.DEFAULT_MODEL, "digits")
            admin.zadd(keys.CATALOGUE, {"digits": time.time() + 1e6})
        yield running


def call(server: OurRedis, user: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``gpuinfer ...`` as a Redis user."""
    variables = {f"GPUINFER_BROKER_{key.upper()}": value for key, value in server.login(user).items()}
    command = [sys.executable, "-m", "gpuinfer", *words]
    environ = {**os.environ, **variables}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=120)


#: What an operator does, in this order; a viewer may do the first of them.
SEEN = [("queue", "status", "--json"), ("model", "default"), ("watcher", "explain"), ("redis", "migrate")]
DONE = [
    ("submit", "[1]"),
    ("queue", "pause", "batch"),
    ("queue", "resume", "batch"),
    ("queue", "purge", "realtime", "--yes"),
    ("dead", "list"),
    ("dead", "drop", "--all"),
    ("restore", "--name", "gpu3@old-host", "--force"),
    ("model", "default", "digits"),
]
#: What a viewer is refused.
REFUSED = [
    ("submit", "[1]"),
    ("result", "00000000-0000-4000-8000-000000000000"),
    ("queue", "pause", "batch"),
    ("dead", "list"),
    ("restore", "--name", "gpu3@old-host", "--force"),
    ("model", "default", "other", "--force"),
]


@pytest.mark.parametrize("words", [*SEEN, *DONE], ids=" ".join)
def test_an_operators_commands_just_work(server: OurRedis, words: tuple[str, ...]) -> None:
    """All that acts on queues and tasks."""
    done = call(server, "operator", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.denied() == []


@pytest.mark.parametrize("words", SEEN, ids=" ".join)
def test_a_viewer_sees_what_goes_on(server: OurRedis, words: tuple[str, ...]) -> None:
    """What waits, who serves it, and why workers come and go."""
    done = call(server, "viewer", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.denied() == []


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_a_viewer_may_not_names_user_and_right(server: OurRedis, words: tuple[str, ...]) -> None:
    """The error says who lacks what, and who has it."""
    done = call(server, "viewer", *words)
    assert done.returncode not in (0, 1), done.stdout
    assert "the Redis user viewer lacks the right to" in done.stderr
    assert "members of the group gpuinfer-operator may" in done.stderr
    assert server.denied()


def test_a_viewer_sees_no_payload_and_no_result(server: OurRedis) -> None:
    """Not by any command, nor by a script."""
    login = BrokerSettings.model_validate(server.login("api"))
    with Client(Settings(broker=login)) as client:
        task_id = client.submit([1.0])
        client.submit([1.0], countdown_s=3600)
    with server.client() as admin:
        admin.lpush("realtime", "x")
        (postponed,) = (name.decode() for name in admin.zrange(keys.LATER, 0, -1))
        assert admin.zcard(keys.later(postponed)) == 1
    calls: list[tuple[str, ...]] = [
        ("LRANGE", keys.list_key("realtime", 0), "0", "-1"),
        ("GET", keys.result(task_id)),
        ("ZRANGE", keys.later(postponed), "0", "-1"),
        ("EVAL", "return redis.call('ZRANGE', KEYS[1], 0, -1)", "1", keys.later(postponed)),
        ("HGETALL", keys.DEAD),
        ("HGETALL", keys.inflight("gpu0@h")),
        ("GET", keys.BODY_PREFIX + task_id),
        ("EVAL", "return redis.call('LRANGE', KEYS[1], 0, -1)", "1", keys.list_key("realtime", 0)),
        ("LPUSH", "realtime", "x"),
        ("SUBSCRIBE", keys.result(task_id)),
        ("SUBSCRIBE", keys.REPLY_PREFIX + "somebody"),
        ("PSUBSCRIBE", "*"),
        ("MONITOR",),
        ("SLOWLOG", "GET"),
        ("CLIENT", "LIST"),
        ("PUBLISH", keys.result(task_id), "x"),
    ]
    with server.client("viewer") as viewer:
        for words in calls:
            with pytest.raises(
                (NoPermissionError, redis.ResponseError), match=r"permission|The user executing"
            ):
                viewer.execute_command(*words)
    with server.client("operator") as operator:
        operator.get(keys.result(task_id))
        for words in (
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("ACL", "LIST"),
            ("PUBLISH", "/0.celery.pidbox", "x"),
        ):
            with pytest.raises(NoPermissionError):
                operator.execute_command(*words)
        with pytest.raises(NoPermissionError):
            operator.set("anything", "else")
    assert server.denied()


def test_a_clients_error_names_user_and_right(server: OurRedis) -> None:
    """As the command line's does."""
    login = BrokerSettings.model_validate(server.login("viewer"))
    with Client(Settings(broker=login)) as client, pytest.raises(BrokerRefused) as caught:
        client.submit([1.0])
    assert "the Redis user viewer lacks the right to" in str(caught.value)
    assert server.denied()


def test_who_has_no_login_is_told_which_group_has(server: OurRedis) -> None:
    """No word of HELLO: the user's name, and what gives it a way."""
    environ = {**os.environ, "GPUINFER_BROKER_URL": server.url}
    command = [sys.executable, "-m", "gpuinfer", "queue", "status"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode == 69
    assert "Redis requires a login, and the user " in done.stderr
    assert "gpuinfer-operator" in done.stderr
    assert "HELLO" not in done.stderr


@pytest.fixture
def files(server: OurRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The password files, and where old ones are remembered."""
    for user, password in PASSWORDS.items():
        (tmp_path / user).write_text(password)
    monkeypatch.setattr(passwords, "PROGRAMS", tmp_path)
    monkeypatch.setattr(passwords, "PEOPLES", tmp_path)
    monkeypatch.setattr(passwords, "OLDER", tmp_path / "older.json")
    return tmp_path


def logs_in(server: OurRedis, user: str, password: str) -> bool:
    with redis.Redis(unix_socket_path=str(server.socket), username=user, password=password) as client:
        try:
            return client.ping() is True
        except redis.AuthenticationError:
            return False


def test_a_password_is_changed_while_all_goes_on(server: OurRedis, files: Path) -> None:
    """Both count until each unit has the new one; then the old goes, and nothing is left to remember."""
    old, seen = PASSWORDS["worker"], []

    def restart(units: Sequence[str], _: object) -> Iterator[tuple[str, bool]]:
        new = (files / "worker").read_text()
        for unit in units:
            seen.append((unit, new != old, logs_in(server, "worker", old), logs_in(server, "worker", new)))
            assert passwords.older()["worker"], "a restart of Redis meanwhile must know both"
            yield unit, True

    units = ["gpuinfer-worker@0.service", "gpuinfer-worker@1.service"]
    with server.client() as admin:
        done = rotation.rotate(admin, "worker", running=lambda _: units, restart=restart)
    assert seen == [(unit, True, True, True) for unit in units]
    assert (done.complete, done.restarted, done.forgotten) == (True, units, 1)
    assert not logs_in(server, "worker", old)
    assert logs_in(server, "worker", (files / "worker").read_text())
    assert not passwords.OLDER.exists()
    assert server.denied()


def test_what_still_has_the_old_password_keeps_it(server: OurRedis, files: Path) -> None:
    """A unit that does not come back, another host's connection: the old one counts until it is dropped."""
    old = PASSWORDS["api"]
    with server.client() as admin:
        units = ["gpuinfer-api.service"]
        fails = [(units[0], False)]
        done = rotation.rotate(admin, "api", running=lambda _: units, restart=lambda *_: iter(fails))
        assert (done.complete, done.failed) == (False, ["gpuinfer-api.service"])
        assert "--drop-old" in done.told()
        with server.client("api") as elsewhere:
            elsewhere.ping()
            done = rotation.rotate(admin, "api", running=lambda _: [], wait_s=0)
            assert (done.complete, len(done.left)) == (False, 1)
        assert len(passwords.older()["api"]) == 2
        assert logs_in(server, "api", old)
        assert rotation.drop_old(admin, "api").forgotten == 2
    assert not logs_in(server, "api", old)
    assert logs_in(server, "api", (files / "api").read_text())
    assert server.denied()


@pytest.mark.parametrize("left", [None, "", "none"])
def test_who_has_no_password_yet_gets_none_by_a_change(
    server: OurRedis, files: Path, left: str | None
) -> None:
    """Else the hash of an empty one would count from then on; Redis and what it starts by stay the same."""
    (files / "viewer").unlink()
    if left is not None:
        (files / "viewer").write_text(left)
    with server.client() as admin:
        before = admin.acl_list()
        with pytest.raises(ConfigError, match="dpkg-reconfigure"):
            rotation.rotate(admin, "viewer")
        with pytest.raises(ConfigError, match="dpkg-reconfigure"):
            rotation.drop_old(admin, "viewer")
        assert admin.acl_list() == before
    assert passwords.older() == {}
    assert not logs_in(server, "viewer", "")
    assert server.denied()


@pytest.mark.parametrize("step", ["keep_older", "write", "connections", "restart"])
def test_a_change_that_is_cut_off_is_finished_by_the_next(
    server: OurRedis, files: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Wherever it ends, Redis and its next start know the password of the file and the old one."""
    old = PASSWORDS["worker"]

    def cut(*_: object) -> Iterator[tuple[str, bool]]:
        raise KeyboardInterrupt

    with server.client() as admin:
        with monkeypatch.context() as cutting:
            if step != "restart":
                cutting.setattr(passwords, step, cut)
            with pytest.raises(KeyboardInterrupt):
                rotation.rotate(admin, "worker", running=lambda _: ["unit"], restart=cut)
        now = (files / "worker").read_text()
        starts_by = acl.rules(passwords.read(), older=passwords.older())["worker"]
        for password in {old, now}:
            assert logs_in(server, "worker", password)
            assert f"#{acl.digest(password)}" in starts_by
        done = rotation.rotate(admin, "worker", running=lambda _: [])
    assert done.complete
    for password in {old, now}:
        assert not logs_in(server, "worker", password)
    assert logs_in(server, "worker", (files / "worker").read_text())
    assert passwords.older() == {}
    assert server.denied()
