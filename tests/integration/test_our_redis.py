# SPDX-License-Identifier: Apache-2.0
"""Our Redis with its users, under all that is done here: each program can do what it does."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import NoPermissionError

from gpuinfer import Client
from gpuinfer.api import schemas
from gpuinfer.broker import cli as broker_cli
from gpuinfer.errors import TaskRevoked
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, QueueSettings, Settings
from gpuinfer.watcher.probe import Probe
from gpuinfer.watcher.state import Instance, Key
from tests.apis import Api, submit
from tests.brokers import CONF, PASSWORDS, OurRedis, our_redis
from tests.models_for_tests import latched, sleeper
from tests.services import Process
from tests.workers import NAME, Workers, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.our_redis]

#: What the shipped producer is refused, as any program that is not the administrator's.
PRODUCERS: list[tuple[str, ...]] = [
    ("RPOP", "realtime"),
    ("LRANGE", "realtime", "0", "-1"),
    ("SET", keys.result("1"), "x"),
    ("LPUSH", keys.DEAD, "x"),
    ("GET", keys.heartbeat(NAME)),
    ("EVAL", "return 1", "0"),
    ("SCAN", "0"),
    ("SUBSCRIBE", "/0.celery.pidbox"),
    ("SADD", "_kombu.binding.celery.pidbox", "x"),
]

IMAGE = load_test_images()[0][0].tolist()
LABEL = load_test_images()[1][0]


def start(workers: Workers, server: OurRedis, models: str = "digits") -> Process:
    """Start worker 0 as its unit does: a user's name, and the password in a file."""
    folder = server.credentials("worker")
    return workers.start(broker_username="worker", credentials_directory=folder, worker_models=models)


def as_admin(workers: Workers, server: OurRedis, *command: str) -> str:
    """Run ``gpuinfer ...`` with the administrator's login; return what it wrote."""
    environment = workers.environment(
        broker_username="admin", credentials_directory=server.credentials("admin")
    )
    return subprocess.run(
        [sys.executable, "-m", "gpuinfer", *command],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def stranger(server: OurRedis, user: str = "admin") -> Celery:
    """Return an application as a stranger writes it, with a login in its URL."""
    url = f"redis+socket://{user}:{PASSWORDS[user]}@{server.socket}"
    return Celery("stranger", broker=url, backend=url, set_as_current=False)


# -- the configuration --------------------------------------------------------------------


def test_configuration(redis_server: OurRedis) -> None:
    """Redis takes the file without a warning: no TCP port, an append-only file, results alone evicted."""
    with redis_server.client() as admin:
        found: dict[str, str] = admin.config_get("*")
    wanted = {"maxmemory-policy": "volatile-ttl", "appendonly": "yes", "appendfsync": "everysec"}
    wanted |= {"port": "0", "save": "", "maxmemory": str(256 * 1024 * 1024), "disable-thp": "yes"}
    assert {key: found[key] for key in wanted} == wanted
    warned = [line for line in redis_server.process.text().splitlines() if "WARNING" in line]
    about_the_host = ("overcommit_memory", "TCP backlog")
    assert [line for line in warned if not any(word in line for word in about_the_host)] == []
    assert redis_server.socket.stat().st_mode & 0o777 == 0o770


def test_an_administrators_line_wins() -> None:
    """What stands at the end of redis.conf has the last word over the settings."""
    with our_redis(more="\nmaxmemory 300mb\n") as server, server.client() as admin:
        assert admin.config_get("maxmemory")["maxmemory"] == str(300 * 1024 * 1024)


def test_a_kill_after_the_fsync_loses_nothing(redis_server: OurRedis, client: Client) -> None:
    """What was accepted, and has reached the disk, is there after a SIGKILL of Redis."""
    task = client.submit([1.0])
    with redis_server.client() as admin:
        wait_until(lambda: admin.info("persistence")["aof_pending_bio_fsync"] == 0)
    redis_server.kill()
    redis_server.start()
    assert client.status(task).state == "queued"
    with redis_server.client() as admin:
        assert admin.llen("realtime") == 1


# -- the whole story ----------------------------------------------------------------------


def test_requests(workers: Workers, redis_server: OurRedis, client: Client) -> None:
    """Worker and API with their own users: one, many, a batch, by idempotency key, cancelled, by HTTP."""
    worker = start(workers, redis_server)
    assert client.result(client.submit(IMAGE), timeout_s=60)["class"] == LABEL
    assert len(client.results(client.submit_many([IMAGE] * 300), timeout_s=60)) == 300
    job = client.result(client.submit_batch([IMAGE, [0]], priority=5), timeout_s=60)
    assert [("error" in answer) for answer in job] == [False, True]
    first = client.submit(IMAGE, idempotency_key="k", queue="default")
    assert client.submit(IMAGE, idempotency_key="k", queue="default") == first
    assert client.result(first, timeout_s=60)
    worker.wait_for_line('"batch_done"')
    assert worker.terminate() == 0
    gone, kept = client.submit(IMAGE, queue="batch"), client.submit(IMAGE, queue="batch", ignore_result=True)
    assert client.cancel(gone)
    assert client.submit(IMAGE, expires_s=0.01)
    worker = start(workers, redis_server)
    assert client.result(client.submit(IMAGE, queue="batch"), timeout_s=60)
    wait_until(lambda: not _exists(redis_server, keys.result(kept)))
    login = {"broker_username": "api", "broker_password": PASSWORDS["api"]}
    with Api(redis_server, workers.folder, **login) as api:
        task = submit(api)
        assert api.http.get(f"/result/{task}", params={"wait": 60}).json()["status"] == "completed"
        assert api.http.get("/health/ready").status_code == 200
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        traced = api.http.post("/predict?wait=60", json=schemas.DIGIT, headers={"traceparent": trace})
        assert (traced.status_code, traced.json()["traceparent"]) == (200, trace)
        worker.wait_for_line(trace)
        assert api.http.post(f"/cancel/{gone}").status_code < 500
    assert worker.running


def _exists(server: OurRedis, key: str) -> bool:
    with server.client() as admin:
        return bool(admin.exists(key))


def test_control(workers: Workers, redis_server: OurRedis, client: Client) -> None:
    """The administrator asks workers and revokes; a worker answers, sends events, and ends by a command."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=1)
    worker = start(workers, redis_server, "slow")
    running = client.submit([1.0], model="slow")
    wait_until(lambda: client.status(running).state == "running")
    waiting = client.submit([1.0], model="slow")
    with stranger(redis_server) as admin:
        assert admin.control.revoke(waiting, destination=[NAME], reply=True, timeout=60.0)
        inspect = admin.control.inspect([NAME], timeout=60.0)
        assert inspect.ping() == {NAME: {"ok": "pong"}}
        assert inspect.stats()[NAME]["total"] == {"gpuinfer.predict": 1}
        assert inspect.active_queues()[NAME]
        admin.control.enable_events()
        latch.open()
        with pytest.raises(TaskRevoked):
            client.result(waiting, timeout_s=60)
        task = admin.send_task("gpuinfer.predict", [[1.0]], {"model": "slow"}, queue="default", priority=3)
        assert task.get(timeout=60)["outputs"]["twice"] == [2.0]
        with pytest.raises(Exception, match="no such task"):
            admin.send_task("no.such.task", [], queue="default").get(timeout=60)
        later = admin.send_task("gpuinfer.predict", [[0.0]], {"model": "slow"}, queue="default", countdown=1)
        assert later.get(timeout=60)
        admin.control.shutdown(destination=[NAME])
    assert worker.wait(60) == 0


def test_plain_producer(
    workers: Workers, redis_server: OurRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user that etc/redis-users.acl shows is enough for a plain Celery app, and for no more."""
    shipped = (CONF.parent / "redis-users.acl").read_text(encoding="utf-8")
    digest = hashlib.sha256(b"mine").hexdigest()
    (tmp_path / "users.acl").write_text(shipped.replace("#user ", "user ").replace("0" * 64, digest))
    monkeypatch.setattr(broker_cli, "MORE_USERS", tmp_path / "users.acl")
    with (redis_server.folder / "users.acl").open("a", encoding="utf-8") as file:
        file.write("\n".join([*broker_cli.more_users().lines, ""]))
    redis_server.stop()
    redis_server.start()
    start(workers, redis_server)
    url = f"redis+socket://producer:mine@{redis_server.socket}"
    with Celery("mine", broker=url, backend=url, set_as_current=False) as app:
        sent = [
            app.send_task("gpuinfer.predict", [IMAGE], queue=queue, priority=priority)
            for queue, priority in zip(QUEUES, (None, 3, 9), strict=True)
        ]
        sent.append(app.send_task("gpuinfer.predict", [IMAGE], queue="realtime.digits", priority=5))
        assert [task.get(timeout=60)["label"] for task in sent] == [str(LABEL)] * 4
        assert sent[0].state == "SUCCESS"
        assert redis_server.denied() == []
        with pytest.raises(NoPermissionError):
            sent[0].forget()
        with pytest.raises(OperationalError, match="no permissions"):
            app.control.shutdown()
    with redis.Redis(unix_socket_path=str(redis_server.socket), username="producer", password="mine") as own:
        for command in PRODUCERS:
            with pytest.raises(redis.ResponseError):
                own.execute_command(*command)
    assert redis_server.denied()


def test_binding_refresh(redis_server: OurRedis) -> None:
    """kombu's upkeep of its bindings runs as the worker: what its event loop does once in a while."""
    from gpuinfer.queue.app import create_app

    settings = Settings.model_validate({"broker": redis_server.login("worker")})
    with create_app(settings) as app, app.connection() as connection:
        node = app.control.mailbox.Node(NAME, channel=connection.channel())
        consumer = node.listen(callback=lambda *_: None)
        channel = consumer.channel
        assert channel._expires, "the control queue has an expiry, so its binding is looked after"
        channel._binding_expiry_refreshed_at = channel._bindings_swept_at = float("-inf")
        channel.maybe_refresh_binding_expiry()
        channel.sweep_bindings()
        with redis_server.client() as admin:
            assert admin.zrange("_kombu.binding_deadlines", 0, -1)
        consumer.cancel()


def test_death_and_return(workers: Workers, redis_server: OurRedis, client: Client) -> None:
    """A killed worker's tasks return at its restart, by the watcher, and in the end as dead letters."""
    slow = workers.folder / "models" / "slow"
    sleeper(slow, 60, max_batch_size=1)
    killer = client.submit([1.0], model="slow")
    worker = start(workers, redis_server, "slow")
    wait_until(lambda: client.status(killer).state == "running")
    with redis_server.client("watcher") as watcher:
        wait_until(lambda: watcher.get(keys.heartbeat(NAME)))
        assert read_depth(watcher).inflight == {NAME: 1}
        assert read_depth(watcher, [NAME]).total_waiting == 0
        probe = Probe(watcher, "elsewhere")
        seen = probe.observe([Instance(key=Key(0, NAME.partition("@")[2]), state="active")], 0.0)
        assert [(str(one.key), one.busy) for one in seen.instances] == [(NAME, True)]
        worker.kill()
        store = Store(watcher, NAME, QUEUES, QueueSettings())
        assert store.restore().ids == (killer,)
        assert client.status(killer).state == "queued"
        worker = start(workers, redis_server, "slow")
        wait_until(lambda: client.status(killer).state == "running")
        worker.kill()
        assert store.restore().dead == (killer,)
        assert read_depth(watcher).dead_letters == 1
        assert watcher.hgetall(keys.CLAIMED) == {b"realtime.slow": b"1"}  # what was put back counts once
    assert client.status(killer).state == "failed"
    listed = json.loads(as_admin(workers, redis_server, "dead", "list", "--json"))
    assert killer in json.dumps(listed)
    as_admin(workers, redis_server, "dead", "retry", killer)
    for _ in range(2):
        worker = start(workers, redis_server, "slow")
        wait_until(lambda: client.status(killer).state == "running")
        worker.kill()
    worker = start(workers, redis_server, "slow")  # its start restores, and buries
    worker.wait_for_line('"task_dead_lettered"')
    worker.terminate()
    as_admin(workers, redis_server, "dead", "drop", killer)
    with redis_server.client() as admin:
        assert not admin.exists(keys.DEAD)


def test_reconnection_after_the_fsync(workers: Workers, redis_server: OurRedis, client: Client) -> None:
    """After a kill of Redis under a batch everybody logs in again, and settles and claims as before."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=2)
    worker = start(workers, redis_server, "slow")
    tasks = client.submit_many([[1.0]] * 5, model="slow")
    wait_until(lambda: client.status(tasks[0]).state == "running")
    with redis_server.client() as admin:
        wait_until(lambda: admin.info("persistence")["aof_pending_bio_fsync"] == 0)
    redis_server.stop()
    worker.wait_for_line('"redis_away"')
    latch.open()
    redis_server.start()
    statuses = list(client.as_completed(tasks, timeout_s=60))
    assert {status.state for status in statuses} == {"completed"}
    worker.send(signal.SIGTERM)
    assert worker.wait(60) == 0
    with redis_server.client() as admin:
        assert not admin.exists(keys.heartbeat(NAME))
