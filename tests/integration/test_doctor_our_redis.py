# SPDX-License-Identifier: Apache-2.0
"""The doctor and the appliance's own Redis: it runs as its files say, setting by setting and user by user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuinfer.broker import cli as broker_cli
from gpuinfer.broker import durability, passwords, trial
from gpuinfer.doctor import broker
from gpuinfer.doctor.host import Finding, Findings, Host, Skipped
from gpuinfer.settings import Loaded, Settings
from tests.brokers import PASSWORDS, OurRedis, our_redis
from tests.conftest import RedisFactory
from tests.services import redis_binary
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def one(found: Findings) -> Finding:
    assert isinstance(found, Finding)
    return found


def test_a_redis_that_runs_otherwise_than_configured(
    redis_factory: RedisFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Somebody changed it by hand, or the settings since its start: a command fixes both, or a restart."""
    server = redis_factory(maxmemory="64mb", maxmemory_policy="volatile-ttl", appendonly="yes")
    monkeypatch.setattr("gpuinfer.doctor.redis_place.OUR_SOCKET", str(server.socket))
    monkeypatch.setattr(trial, "BINARY", redis_binary())
    (tmp_path / "etc/gpuinfer").mkdir(parents=True)
    conf = "maxmemory 64mb\nmaxmemory-policy volatile-ttl\nappendonly yes\n"
    (tmp_path / "etc/gpuinfer/redis.conf").write_text(conf)
    here = Host(Loaded(Settings.model_validate({"broker": {"url": server.url}}), {}), root=tmp_path)
    assert one(broker.as_configured(here)).status == "ok"
    with server.client() as client:
        client.config_set("maxmemory", "32mb")
    found = one(broker.as_configured(here))
    assert found.message == "1 settings differ: maxmemory is 33554432, /etc/gpuinfer/redis.conf says 67108864"
    assert (found.status, found.remedy) == ("warning", "gpuinfer redis apply-settings")
    with server.client() as client:
        client.config_set("loglevel", "debug")
    assert one(broker.as_configured(here)).remedy == "systemctl restart gpuinfer-redis"
    (tmp_path / "etc/gpuinfer/redis.conf").write_text("maxmemory lots\n")
    found = one(broker.as_configured(here))
    assert found.message.startswith("Redis does not start with /etc/gpuinfer/redis.conf as it is now: ")


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OurRedis]:
    """Our own Redis as the package starts it, and its files where the doctor looks for them."""
    with our_redis() as server:
        monkeypatch.setattr("gpuinfer.doctor.redis_place.OUR_SOCKET", str(server.socket))
        monkeypatch.setattr(trial, "BINARY", redis_binary())
        monkeypatch.setattr(broker, "CONF", str(server.folder / "redis.conf"))
        monkeypatch.setattr(broker, "TUNING", str(server.folder / "tuning.conf"))
        (tmp_path / "credentials").mkdir()
        for user, password in PASSWORDS.items():
            (tmp_path / "credentials" / user).write_text(password)
        monkeypatch.setattr(passwords, "PROGRAMS", tmp_path / "credentials")
        monkeypatch.setattr(passwords, "PEOPLES", tmp_path / "credentials")
        monkeypatch.setattr(broker_cli, "MORE_USERS", tmp_path / "redis-users.acl")
        yield server


def sound_host(server: OurRedis) -> Host:
    sections = {"broker": server.login("admin"), "redis": {"maxmemory_mb": 256}}
    return Host(Loaded(Settings.model_validate(sections), {}))


def test_each_setting_of_our_redis_is_compared(ours: OurRedis) -> None:
    """Whatever line of the shipped file it is that the running instance does not follow."""
    here = sound_host(ours)
    sound = one(broker.as_configured(here))
    assert (sound.status, sound.message.startswith("runs as ")) == ("ok", True)
    assert int(sound.message.rpartition(", in ")[2].split()[0]) >= 20
    changes = {
        "maxmemory-samples": "3",
        "client-output-buffer-limit": "normal 1mb 1mb 1",
        "loglevel": "debug",
    }
    with ours.client() as client:
        for key, value in changes.items():
            client.config_set(key, value)
    found = one(broker.as_configured(here))
    assert (found.status, found.remedy) == ("warning", "systemctl restart gpuinfer-redis")
    for key in changes:
        assert f"{key} is " in found.message


def test_no_remedy_restarts_a_redis_that_would_lose_its_queue(ours: OurRedis) -> None:
    """Without an append-only file, and where a start would not look for the one there is."""
    here, at_once = sound_host(ours), f"-s {ours.socket} CONFIG SET appendonly yes && editor "
    for key, value in {"appendonly": "no", "loglevel": "debug", "maxmemory": "0"}.items():
        with ours.client() as client:
            client.config_set(key, value)
        for check in (broker.limits, broker.durable, broker.as_configured):
            found = check(here)
            each = [found] if isinstance(found, Finding) else found
            assert not [finding for finding in each if "restart" in finding.remedy]
            assert [finding for finding in each if at_once in finding.remedy]
    assert one(broker.as_configured(here)).message.endswith("; a restart now would lose the queue")
    with ours.client() as client:
        client.lpush("queue", "task")
        client.config_set("appendonly", "yes")  # as the remedy does
        wait_until(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0)
        client.config_set("loglevel", "notice")
        client.config_set("maxmemory", str(256 * 1024 * 1024))
    assert one(broker.as_configured(here)).status == "ok"
    ours.kill()
    ours.start()
    with ours.client() as client:
        assert client.llen("queue") == 1
    conf = ours.folder / "redis.conf"
    for line in ("appendonly no", "appenddirname another"):
        conf.write_text(f"{conf.read_text().replace('appendonly no', 'appendonly yes')}\n{line}\n")
        found = one(broker.as_configured(here))
        assert "restart" not in found.remedy, line
        assert found.message.endswith("; a restart now would lose the queue")


def test_a_queue_on_no_disk_is_moved_by_the_runbook(ours: OurRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis would start in a new folder without the queue."""
    monkeypatch.setattr(durability, "_IN_MEMORY", {durability.file_system(ours.folder).kind})
    found = one(broker.durable(sound_host(ours)))
    assert found.message.startswith("appendfsync everysec: nothing is promised about a power cut")
    assert "CONFIG GET dir  # to move it to a disk: the runbook, " in found.remedy


def test_the_users_of_our_redis_are_compared(ours: OurRedis) -> None:
    """A right given by hand, a password that was changed, a user that only one side knows."""
    here = sound_host(ours)
    assert one(broker.users(here)).message == "7 users as the files name them"
    with ours.client() as client:
        client.execute_command("ACL", "SETUSER", "api", "+flushall")
        client.execute_command("ACL", "SETUSER", "worker", "(+del ~realtime)")
        client.execute_command("ACL", "SETUSER", "stranger", "on", "nopass", "+@all", "~*")
    (passwords.PROGRAMS / "watcher").write_text("another")
    broker_cli.MORE_USERS.write_text("user mine on nopass ~x +get\n")
    found = broker.users(here)
    assert isinstance(found, list)
    assert found[0].message.endswith(" for api, mine, watcher, worker")
    assert found[0].remedy == "gpuinfer redis apply-users", "it leaves other users alone"
    assert found[1].message.endswith("does not name, and would lose them at a restart: stranger")
    assert found[1].remedy.endswith(f"-s {ours.socket} ACL DELUSER stranger")
    assert not [finding for finding in found if "systemctl" in finding.remedy]
    assert not [finding for finding in found if "another" in finding.message]
    (passwords.PROGRAMS / "watcher").unlink()
    with pytest.raises(Skipped, match="watcher: cannot be read"):
        broker.users(here)
