# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer redis apply-users``, ``apply-settings``: a Redis that runs takes what is new; nobody notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from gpuinfer.broker import acl, tuning
from gpuinfer.queue import keys
from tests.brokers import PASSWORDS, OurRedis, our_redis

pytestmark = pytest.mark.integration

#: What an edition before may have given: it knew neither the index nor reply channels.
OLD = "resetchannels -@all +auth +hello +ping +select +client|setname +client|id +subscribe +unsubscribe"
OLD += " &celery-task-meta-* (+get ~celery-task-meta-*) (+lpush ~gpuinfer:forbidden-since)"


@pytest.fixture
def server() -> Iterator[OurRedis]:
    """Our Redis whose users have an older edition's rights, and one that an administrator has added."""
    with our_redis() as started:
        with started.client() as admin:
            for user in ("api", "worker", "watcher"):
                rules = ["reset", "on", f">{PASSWORDS[user]}", *_split(OLD)]
                admin.execute_command("ACL", "SETUSER", user, *rules)
            admin.execute_command("ACL", "SETUSER", "own", "on", ">own", "~own*", "+lpush", "+ping")
        yield started


def _split(rules: str) -> list[str]:
    """Return the rules of a line as Redis takes them: a selector is one."""
    parts: list[str] = []
    for word in rules.split():
        if parts and parts[-1].startswith("(") and not parts[-1].endswith(")"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    """All users' passwords, as they lie in /etc/gpuinfer/credentials."""
    for user, password in PASSWORDS.items():
        (tmp_path / user).write_text(password + "\n", encoding="utf-8")
    return tmp_path


def apply(
    server: OurRedis, credentials: Path, *options: str, what: str = "users", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as root does at an upgrade."""
    variables |= {"GPUINFER_BROKER_URL": server.url, "CREDENTIALS_DIRECTORY": str(credentials)}
    command = [sys.executable, "-m", "gpuinfer", "redis", f"apply-{what}", *options]
    return subprocess.run(
        command, check=False, env=os.environ | variables, capture_output=True, text=True, timeout=120
    )


def test_connections_stay_and_gain_the_new_rights(server: OurRedis, credentials: Path) -> None:
    """Who is connected goes on with the same connection: it could not before, and can after."""
    with (
        server.client("worker") as worker,
        server.client("api") as api,
        server.client("api") as listener,
        server.client() as admin,
        redis.Redis(unix_socket_path=str(server.socket), username="own", password="own") as own,
    ):
        ids = [client.client_id() for client in (worker, api)]
        heard = listener.pubsub()
        heard.subscribe(keys.result("1"))
        assert heard.get_message(timeout=60)
        own.lpush("own", "1")
        for client, command in (
            (worker, ("HGET", keys.epoch("w"), "number")),
            (api, ("GET", keys.FORMAT_KEY)),
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
        before = acl.listed(admin)["own"]
        assert server.denied()

        done = apply(server, credentials)
        assert (done.returncode, done.stdout) == (0, "new rights for api, worker, watcher\n"), done.stderr

        assert worker.hget(keys.epoch("w"), "number") is None
        assert api.get(keys.FORMAT_KEY) is None
        assert [client.client_id() for client in (worker, api)] == ids
        assert admin.publish(keys.result("1"), "told") == 1
        message = heard.get_message(timeout=60)
        assert message is not None
        assert message["data"] == b"told"
        own.lpush("own", "2")
        assert acl.listed(admin)["own"] == before
        with pytest.raises(NoPermissionError):  # what this version gives no more is gone
            api.lpush("gpuinfer:forbidden-since", "x")
        assert server.denied()
        heard.close()


def test_it_gives_what_a_start_gives(server: OurRedis, credentials: Path) -> None:
    """The same users as the file that Redis starts with; a second time there is nothing to change."""
    assert apply(server, credentials).returncode == 0
    with server.client() as admin:
        admin.acl_deluser("own")
        applied = acl.listed(admin)
    again = apply(server, credentials, "--json")
    assert json.loads(again.stdout) == {
        "users": ["admin", "api", "worker", "watcher", "operator", "viewer"],
        "changed": [],
    }
    server.stop()
    server.start()
    with server.client() as admin:
        assert acl.listed(admin) == applied


def test_the_administrators_own_users_are_given_too(server: OurRedis, credentials: Path) -> None:
    """Those of redis-users.acl, made or changed; one that no file names stays as it is."""
    with server.client() as admin:
        before = acl.listed(admin)["own"]
        for rules in ("on nopass ~x +get", "on nopass ~y +get"):
            (credentials / "redis-users.acl").write_text(f"# mine\nuser mine {rules}\n")
            done = json.loads(apply(server, credentials, "--json").stdout)
            assert done["users"][-1] == done["changed"][0] == "mine"
            (mine,) = acl.listed(admin)["mine"]
            assert set(rules.split()[2:]) <= set(mine)
            assert len([rule for rule in mine if rule.startswith("~")]) == 1
        assert acl.listed(admin)["own"] == before


def test_new_limits_need_no_restart(server: OurRedis, credentials: Path) -> None:
    """So that a Redis without an append-only file keeps its queue; a second time nothing changes."""
    with server.client() as admin:
        admin.config_set("appendonly", "no")
        admin.lpush("queue", "task")
        done = apply(server, credentials, what="settings", GPUINFER_REDIS_MAXMEMORY_MB="300")
        assert (done.returncode, done.stdout) == (0, f"maxmemory is {300 * 2**20} now\n"), done.stderr
        again = apply(server, credentials, "--json", what="settings", GPUINFER_REDIS_MAXMEMORY_MB="300")
        assert json.loads(again.stdout) == {"changed": {}}
        assert admin.config_get("maxmemory") == {"maxmemory": str(300 * 2**20)}
        assert admin.llen("queue") == 1


def test_a_mode_that_a_start_would_measure_for_is_left_alone(server: OurRedis, credentials: Path) -> None:
    """Nothing was measured here: a Redis that loses nothing is not turned into one that may."""
    with server.client() as admin:
        admin.config_set("appendfsync", "always")
        done = apply(server, credentials, "--json", what="settings", GPUINFER_REDIS_APPENDFSYNC="auto")
        assert (done.returncode, "appendfsync" in json.loads(done.stdout)["changed"]) == (0, False)
        assert "appendfsync stays as it is" in done.stderr
        assert admin.config_get("appendfsync") == {"appendfsync": "always"}


def test_redis_conf_wins_over_the_settings(server: OurRedis, tmp_path: Path) -> None:
    """As at a start: tuning.conf is included at its beginning."""
    conf = tmp_path / "redis.conf"
    conf.write_text("include tuning.conf\nmaxmemory 200mb\n")
    with server.client() as admin:
        wanted = {"maxmemory": "300mb", "appendfsync": "always"}
        changed = tuning.apply(admin, wanted, conf)
        assert changed == {"maxmemory": str(200 * 2**20), "appendfsync": "always"}


def test_whatever_the_format(server: OurRedis, credentials: Path) -> None:
    """Rights are no part of the format: an upgrade that needs both begins with the rights."""
    with server.client() as admin:
        admin.set(keys.FORMAT_KEY, "1")
    assert apply(server, credentials).returncode == 0


def test_a_redis_that_is_away_or_another_ones(server: OurRedis, credentials: Path) -> None:
    """Without the administrator's password, or without Redis, it says so and changes nothing."""
    (credentials / "admin").write_text("wrong", encoding="utf-8")
    done = apply(server, credentials)
    assert done.returncode == 69
    assert "Redis refused the password" in done.stderr
    (credentials / "admin").unlink()
    done = apply(server, credentials)
    assert done.returncode == 78
    assert f"{credentials / 'admin'}: cannot be read" in done.stderr
    assert server.denied()
    (credentials / "admin").write_text(PASSWORDS["admin"], encoding="utf-8")
    server.stop()
    assert apply(server, credentials).returncode == 69
    server.start()
