# SPDX-License-Identifier: Apache-2.0
"""What workers hold that never return: real workers that are killed, and a real watcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.settings import Settings
from tests.conftest import RedisFactory
from tests.models_for_tests import Latch, latched
from tests.orphans import check, elsewhere, ends, gpuinfer, held, submit, wait_for_batch, watch
from tests.services import Process, RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def redis_server(redis_factory: RedisFactory) -> RedisServer:
    """One that comes back with what it held."""
    return redis_factory(appendonly="yes")


@pytest.fixture
def latch(tmp_path: Path) -> Latch:
    """Closed at first: who holds tasks is killed in the middle of a batch."""
    return latched(tmp_path / "models" / "slow", max_batch_size=4)


@pytest.fixture
def workers(redis_server: RedisServer, tmp_path: Path, latch: Latch) -> Iterator[Workers]:
    made = Workers(redis_server, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def client(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Iterator[Client]:
    with Client(settings_for(redis_server)) as opened:
        yield opened


def ended_well(client: Client, redis_server: RedisServer, watcher: Process, ids: list[str]) -> None:
    """Each task has its result, once; nothing is left in flight, and the watcher has said what it did."""
    check(client, ids)
    wait_until(lambda: held(redis_server) == {})
    assert ends(redis_server) == {"completed": len(ids)}
    watcher.wait_for_line('"reaped"')
    assert watcher.text().count('"reaped"') == 1
    assert watcher.terminate(90) == 0


def test_a_host_burns(workers: Workers, redis_server: RedisServer, client: Client, latch: Latch) -> None:
    """Killed with its host, it never returns: another host's watcher puts its tasks back."""
    burnt = elsewhere(workers, "burnt")
    ids = submit(client, 4)
    wait_for_batch(redis_server, "gpu0@burnt", 4)
    burnt.kill()
    latch.open()
    watcher = watch(workers)
    ended_well(client, redis_server, watcher, ids)
    line = watcher.wait_for_line('"reaped"')
    assert '"worker": "gpu0@burnt"' in line.replace('":"', '": "')
    assert "nor of a watcher of burnt" in line


def _may_rename() -> bool:
    return subprocess.run(["unshare", "-u", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_rename(), reason="this user may not have a host name of its own")
def test_a_host_is_renamed(workers: Workers, redis_server: RedisServer, client: Client, latch: Latch) -> None:
    """It comes up under another name, with the folder it had: what the old name held is put back."""
    script = f"hostname before && exec {sys.executable} -m gpuinfer worker 0"
    before = workers.spawn("unshare", "-u", "sh", "-c", script, name="before", worker_models="slow")
    before.wait_for_line('"worker_ready"')
    ids = submit(client, 4)
    wait_for_batch(redis_server, "gpu0@before", 4)
    before.kill()
    latch.open()
    ended_well(client, redis_server, watch(workers), ids)


def test_a_container_is_replaced(
    workers: Workers, redis_server: RedisServer, client: Client, latch: Latch
) -> None:
    """The new one has the name and a folder of its own: it waits until the old one is silent."""
    old = workers.start(worker_models="slow", worker_run_dir=workers.folder / "old")
    ids = submit(client, 4)
    wait_for_batch(redis_server, NAME, 4)
    old.kill()
    latch.open()
    ended_well(client, redis_server, watch(workers), ids)


def test_a_plain_process_dies(
    workers: Workers, redis_server: RedisServer, client: Client, latch: Latch
) -> None:
    """There is no systemd that would put back: the watcher itself does, and starts it again."""
    watcher = watch(workers, watcher_floor=1)
    children = Path(f"/proc/{watcher.pid}/task/{watcher.pid}/children")
    wait_until(lambda: children.read_text().split(), 60)
    (first,) = children.read_text().split()
    watcher.wait_for_line('"worker_ready"', 60)
    ids = submit(client, 4)
    wait_for_batch(redis_server, NAME, 4)
    watcher.send(signal.SIGSTOP)  # it finds the death, and the tasks at their place
    os.kill(int(first), signal.SIGKILL)
    latch.open()
    watcher.send(signal.SIGCONT)
    check(client, ids)
    wait_until(lambda: held(redis_server) == {})
    assert ends(redis_server) == {"completed": 4}
    assert watcher.terminate(90) == 0


def test_a_unit_dies_while_redis_is_away(
    workers: Workers, redis_server: RedisServer, client: Client, latch: Latch
) -> None:
    """systemd's restore found no Redis, and is not tried again: the watcher does it when Redis is back."""
    worker = workers.start(worker_models="slow")
    ids = submit(client, 4)
    wait_for_batch(redis_server, NAME, 4)
    redis_server.stop()
    worker.kill()
    latch.open()
    code, body = gpuinfer(workers, "restore", "0")
    assert (code, body["error"]["code"]) == (69, "broker_unavailable")
    redis_server.start()
    assert held(redis_server) == {NAME: 4}
    ended_well(client, redis_server, watch(workers), ids)


def test_by_hand(workers: Workers, redis_server: RedisServer, client: Client) -> None:
    """Named with the command, refused while it may live, put back by force; what ran twice is dead."""
    ids = submit(client, 2)
    first = _restore_lost(workers, redis_server, "lost1")
    assert (sorted(first["task_ids"]), first["dead"]) == (sorted(ids), [])
    second = _restore_lost(workers, redis_server, "lost2")
    assert (len(second["dead"]), sorted(second["task_ids"] + second["dead"])) == (1, sorted(ids))
    assert held(redis_server) == {}
    assert ends(redis_server) == {"dead": 1}


def _restore_lost(workers: Workers, redis_server: RedisServer, host: str) -> dict[str, Any]:
    """Let a host's worker begin two tasks, and be killed; put them back by hand; return what is printed."""
    lost, name = elsewhere(workers, host), f"gpu0@{host}"
    wait_for_batch(redis_server, name, 2)
    code, body = gpuinfer(workers, "restore", "--name", name)
    assert (code, body["error"]["code"]) == (73, "worker_running")
    lost.kill()
    wait_until(lambda: gpuinfer(workers, "queue", "status")[1]["silent"].keys() == {name}, 60)
    shown = subprocess.run(
        [sys.executable, "-m", "gpuinfer", "queue", "status"],
        env=workers.environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"in flight at {name}: 2, silent for " in shown
    assert f"; gpuinfer restore --name {name} puts them back" in shown
    code, body = gpuinfer(workers, "restore", "--name", name, watcher_reap_after_s=3600)
    assert (code, "may come back" in body["error"]["message"]) == (73, True)
    code, body = gpuinfer(workers, "restore", "--name", name, "--force", watcher_reap_after_s=3600)
    assert code == 0
    found: dict[str, Any] = body
    return found


def test_the_name_of_this_host(workers: Workers, redis_server: RedisServer, client: Client) -> None:
    """--name gpu0@here is 0: refused while it runs, by force too, and done when it does not."""
    here = f"gpu0@{socket.gethostname()}"
    worker = workers.start(worker_models="slow")
    ids = submit(client, 2)
    wait_for_batch(redis_server, here, 2)
    for more in ((), ("--force",)):
        code, body = gpuinfer(workers, "restore", "--name", here, *more)
        assert (code, "as process" in body["error"]["message"]) == (73, True)
    worker.kill()
    code, body = gpuinfer(workers, "restore", "--name", here)
    assert (code, sorted(body["task_ids"])) == (0, sorted(ids))
    assert gpuinfer(workers, "restore", "0") == (0, body | {"returned": 0, "task_ids": []})
