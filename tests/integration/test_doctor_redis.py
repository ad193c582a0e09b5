# SPDX-License-Identifier: Apache-2.0
"""The doctor and Redis: each common failure, made for real, is told from the others and has its remedy."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from gpuinfer.broker import acl
from gpuinfer.doctor import broker, fleet, system, work
from gpuinfer.doctor.host import Finding, Host, Skipped
from gpuinfer.doctor.redis_place import diagnose, place_of
from gpuinfer.queue import keys
from gpuinfer.settings import Loaded, Settings
from tests.conftest import RedisFactory
from tests.services import RedisServer, free_port, make_certificate
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def host(url: str, **broker_settings: object) -> Host:
    settings = Settings.model_validate({"broker": {"url": url, "connect_timeout_s": 60, **broker_settings}})
    return Host(Loaded(settings, {}))


def reach(url: str, **broker_settings: object) -> Finding:
    found = broker.reach(host(url, **broker_settings))
    assert found.remedy or found.status == "ok"
    return found


def test_a_sound_redis(redis_server: RedisServer) -> None:
    """It answers, and takes work."""
    found = reach(redis_server.url)
    assert (found.status, found.remedy) == ("ok", "")
    assert "takes new work" in found.message
    with redis_server.client() as client:
        assert client.dbsize() == 0, "the doctor leaves nothing behind"


def test_no_socket(tmp_path: Path) -> None:
    """Nobody has made the socket: Redis does not run."""
    found = reach(f"unix://{tmp_path}/none.sock")
    assert "nothing listens" in found.message
    assert found.status == "error"


def test_the_wrong_socket(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis runs, and broker.url names another place: the remedy names the right one."""
    monkeypatch.setattr("gpuinfer.doctor.redis_place.OUR_SOCKET", str(redis_server.socket))
    found = reach(f"unix://{tmp_path}/none.sock")
    assert "broker.url is wrong" in found.message
    assert f"GPUINFER_BROKER_URL='unix://{redis_server.socket}?db=0'" in found.remedy


def test_a_socket_nobody_listens_on(redis_server: RedisServer) -> None:
    """Redis was killed, and its socket is still there."""
    redis_server.kill()
    found = reach(redis_server.url)
    assert "nothing listens" in found.message


def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    """A plain file at that path."""
    (tmp_path / "file").write_text("")
    found = reach(f"unix://{tmp_path}/file")
    assert "is not a socket" in found.message
    assert found.remedy.startswith("ls -l")


def test_a_port_nobody_listens_on() -> None:
    """Refused, as by a host without Redis."""
    found = reach(f"redis://127.0.0.1:{free_port()}/0")
    assert "nothing listens at 127.0.0.1" in found.message


def test_an_unknown_host() -> None:
    """The name service knows no such name."""
    found = reach("redis://no-such-host.invalid:6379/0")
    assert "does not know no-such-host.invalid" in found.message
    assert found.remedy == "getent hosts no-such-host.invalid"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_socket_closed_to_this_user(redis_factory: RedisFactory) -> None:
    """Who is not in the socket's group is told how to join it."""
    server = redis_factory(unixsocketperm=700)
    server.folder.chmod(0o755)
    os.seteuid(65534)
    try:
        found = reach(server.url)
    finally:
        os.seteuid(0)
    assert "may not use the socket" in found.message
    assert found.remedy.startswith(f"usermod -aG $(stat -c %G {server.folder}")


def test_a_password_is_wanted(redis_factory: RedisFactory) -> None:
    """NOAUTH, and WRONGPASS: two remedies."""
    server = redis_factory(requirepass="right")
    assert "wants a password, and none is set" in reach(server.url).message
    wrong = reach(server.url, password="wrong")
    assert "rejects user default" in wrong.message
    assert "broker.password" in wrong.message
    assert reach(server.url, password="right").status == "ok"


def test_our_own_redis_with_another_password(
    redis_factory: RedisFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At our own socket the remedy is to give Redis the passwords anew, and loses no queue."""
    server = redis_factory(requirepass="right")
    monkeypatch.setattr("gpuinfer.doctor.redis_place.OUR_SOCKET", str(server.socket))
    assert reach(server.url, password="wrong").remedy.startswith("gpuinfer redis apply-users")
    as_admin = reach(server.url, username="admin", password="wrong").remedy
    login = "REDISCLI_AUTH=$(cat /etc/gpuinfer/credentials/api) redis-cli --user api"
    asked = f"{login} -s {server.socket} INFO persistence | grep aof_enabled:1"
    assert as_admin == f"{asked} && systemctl restart gpuinfer-redis"
    assert reach(server.url).remedy.startswith("usermod -aG gpuinfer-operator ")
    assert reach(server.url).remedy.endswith("sudo gpuinfer doctor")


def test_a_user_without_the_rights(redis_server: RedisServer) -> None:
    """NOPERM names the user and what was denied; the remedy shows the user's rights."""
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "poor", "on", ">pw", "~*", "+ping", "+client")
    found = reach(redis_server.url, username="poor", password="pw")
    assert "Redis's user poor lacks a right (NOPERM)" in found.message
    assert "ACL GETUSER poor" in found.remedy
    with pytest.raises(Skipped, match="this login may not ask"):
        broker.limits(host(redis_server.url, username="poor", password="pw"))


def test_a_full_redis(redis_factory: RedisFactory) -> None:
    """OOM is seen without writing anything, and reads still work for the other checks."""
    server = redis_factory(maxmemory="2mb", maxmemory_policy="volatile-ttl")
    with server.client() as client, pytest.raises(redis.exceptions.OutOfMemoryError):
        for number in range(1000):
            client.set(f"x{number}", b"x" * 10_000)
    found = reach(server.url)
    assert "Redis is full (maxmemory)" in found.message
    assert "gpuinfer queue status" in found.remedy
    assert [found.status for found in broker.usage(host(server.url))] == ["warning"]  # type: ignore[union-attr]


def test_a_redis_that_cannot_save(redis_factory: RedisFactory) -> None:
    """MISCONF, by a snapshot that fails."""
    server = redis_factory(save="3600 1000000", stop_writes_on_bgsave_error="yes")
    with server.client() as client:
        (server.folder / "dump.rdb").mkdir()  # what is to be written is a folder
        client.set("x", 1)
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    found = reach(server.url)
    assert "(MISCONF)" in found.message
    assert "df -h" in found.remedy


def test_a_redis_that_loads(redis_factory: RedisFactory) -> None:
    """LOADING, while it reads what it had kept: the remedy is to wait."""
    server = redis_factory(save="", appendonly="no", enable_debug_command="yes")
    with server.client() as client:
        client.execute_command("DEBUG", "POPULATE", "20000", "key", "100")
        client.config_set("key-load-delay", "5000")
        client.config_set("loading-process-events-interval-bytes", "1024")
        reload = threading.Thread(target=_reload, args=(server,))
        reload.start()
        try:
            wait_until(lambda: b"LOADING" in _raw(server, b"GET x\r\n"))
            found = reach(server.url)
        finally:
            server.kill()
            reload.join()
    assert "is loading its data after a start" in found.message
    assert "sleep 10; gpuinfer doctor redis.reach" in found.remedy


def _reload(server: RedisServer) -> None:
    with server.client() as client:
        try:
            client.execute_command("DEBUG", "RELOAD")
        except Exception:
            return


def _raw(server: RedisServer, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(60)
        plain.connect(str(server.socket))
        plain.sendall(command)
        return plain.recv(1000)


def test_a_replica(redis_factory: RedisFactory) -> None:
    """READONLY: broker.url must name the master."""
    port = free_port()
    redis_factory(port=port)
    replica = redis_factory(replicaof=f"127.0.0.1 {port}")
    with replica.client() as client:
        wait_until(lambda: client.info("replication")["master_link_status"] == "up")
    assert "read-only replica" in reach(replica.url).message


def test_a_database_that_is_not_there(redis_server: RedisServer) -> None:
    """A number that Redis has not."""
    assert "database that Redis does not have" in reach(redis_server.url.replace("db=0", "db=99")).message


def test_too_many_clients(redis_factory: RedisFactory) -> None:
    """maxclients."""
    server = redis_factory(maxclients=1)
    with server.client() as client:
        client.ping()
        assert "reached its limit of clients" in reach(server.url).message


@pytest.fixture
def tls(redis_factory: RedisFactory, tmp_path: Path) -> tuple[str, Path]:
    """A Redis that speaks TLS: its address, and the CA."""
    certificate, key = make_certificate(tmp_path)
    port = free_port()
    options = {"tls_cert_file": str(certificate), "tls_key_file": str(key), "tls_auth_clients": "no"}
    redis_factory(tls_port=port, tls_ca_cert_file=str(certificate), **options)
    return f"127.0.0.1:{port}", certificate


def test_tls(tls: tuple[str, Path], tmp_path: Path) -> None:
    """With its CA it is sound; without, with none that can be read, and by another name it is not."""
    address, certificate = tls
    assert reach(f"rediss://{address}/0", tls_ca=str(certificate)).status == "ok"
    unknown = reach(f"rediss://{address}/0")
    assert "is refused: " in unknown.message
    assert "broker.tls_ca: its CA's file" in unknown.remedy
    assert unknown.remedy.startswith(f"openssl s_client -connect {address}")
    gone = reach(f"rediss://{address}/0", tls_ca=str(tmp_path / "gone.crt"))
    assert "gone.crt cannot be read" in gone.message
    name = reach(f"rediss://{address.replace('127.0.0.1', 'localhost')}/0", tls_ca=str(certificate))
    assert "not valid for 'localhost'" in name.message
    assert "broker.url: its name" in name.remedy


def test_tls_on_one_side_only(tls: tuple[str, Path], redis_factory: RedisFactory) -> None:
    """redis:// to a TLS port, and rediss:// to a plain one."""
    assert "must begin with rediss://" in reach(f"redis://{tls[0]}/0").message
    port = free_port()
    redis_factory(port=port)
    plain = reach(f"rediss://127.0.0.1:{port}/0", tls_ca=str(tls[1]))
    assert "does not speak TLS; broker.url must begin with redis://" in plain.message


@contextmanager
def answering(words: bytes) -> Iterator[int]:
    """Listen on a port and answer every line so; nothing at all when there are no words."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                kept.append(peer)
                if words:
                    peer.sendall(words)

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        for peer in kept:
            peer.close()


def test_something_else_listens() -> None:
    """A web server, say."""
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert "is not Redis" in reach(f"redis://127.0.0.1:{port}/0").message


def test_nobody_answers() -> None:
    """Connected, and then silence."""
    with answering(b"") as port:
        found = reach(f"redis://127.0.0.1:{port}/0", connect_timeout_s=0.3)
    assert "gave no answer in 0.3 s" in found.message


def test_no_password_is_shown(redis_factory: RedisFactory) -> None:
    """Neither in a message nor in a remedy."""
    server = redis_factory(requirepass="right")
    found = reach(f"unix://me:hunter2@{server.socket}?db=0")
    assert found.status == "error"
    assert "hunter2" not in found.message + found.remedy


def test_limits(redis_factory: RedisFactory) -> None:
    """A policy that evicts queues is an error; no limit and no file are warnings."""
    sound = redis_factory(maxmemory="64mb", maxmemory_policy="volatile-ttl", appendonly="yes")
    assert broker.limits(host(sound.url)) == Finding(
        "ok", "maxmemory 64 MiB, volatile-ttl, an append-only file"
    )
    ill = broker.limits(host(redis_factory(maxmemory_policy="allkeys-lru").url))
    assert isinstance(ill, list)
    assert [finding.status for finding in ill] == ["error", "warning", "warning"]
    assert "CONFIG SET maxmemory-policy volatile-ttl" in ill[0].remedy
    assert broker.file(host(sound.url)) == Finding("ok", "Redis's last writes to its disk succeeded")


def test_evictions_are_told(redis_factory: RedisFactory) -> None:
    """Results that were dropped before their time."""
    server = redis_factory(maxmemory="2mb", maxmemory_policy="volatile-ttl")
    assert isinstance(broker.usage(host(server.url)), Finding)
    with server.client() as client:
        for number in range(200):
            client.set(f"celery-task-meta-{number}", b"x" * 10000, ex=100)
    found = broker.usage(host(server.url))
    assert isinstance(found, list)
    assert found[-1].status == "warning"
    assert "results were evicted" in found[-1].message
    assert found[-1].remedy.endswith(" CONFIG SET maxmemory 4mb  # or less queue.result_ttl_s")


def test_the_clocks_agree(redis_server: RedisServer) -> None:
    """Redis is on this host."""
    assert system.clocks(host(redis_server.url)).status == "ok"


def test_without_a_worker(redis_server: RedisServer, tmp_path: Path) -> None:
    """An error once something waits, with the command that tells why nothing runs; no request is sent."""
    here = Host(host(redis_server.url).loaded, root=tmp_path)
    idle = fleet.workers(here)
    assert idle == [Finding("ok", "0 workers run: no task waits for one")]
    with pytest.raises(Skipped, match="no live worker"):
        work.request(here)
    with redis_server.client() as client:
        client.lpush(keys.list_key("default", 0), b"{}")
    found = fleet.workers(here)
    assert found == Finding("error", "no worker runs, and 1 task waits", "gpuinfer worker 0")
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    found = fleet.workers(here)
    assert isinstance(found, Finding)
    assert found.remedy.startswith("gpuinfer doctor units; gpuinfer watcher explain; journalctl -u ")


def test_a_redis_that_is_too_old() -> None:
    """6 does not know how our scripts begin."""
    words = "Error compiling script (new function): user_script:1: unexpected symbol near '#'"
    found = diagnose(redis.ResponseError(words), place_of(host("redis://there/0").settings.broker))
    assert "Redis is too old: 7.0 or newer" in found.message


@pytest.mark.parametrize("user", acl.USERS)
def test_every_user_of_ours_may_be_examined(redis_server: RedisServer, user: str) -> None:
    """Each login can be told to be sound; what it may not ask is skipped, no error."""
    with redis_server.client() as client:
        rules = ["on", ">pw", "resetchannels", "-@all", *acl.RULES[user]]
        client.execute_command("ACL", "SETUSER", user, *rules)
        client.execute_command("ACL", "SETUSER", "default", "off")
    here = host(redis_server.url, username=user, password="pw")
    assert broker.reach(here).message.endswith(f"answers as user {user}, and takes new work")
    for check in (
        *(broker.usage, broker.file),
        broker.limits,
    ):
        assert check(here)
