# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer worker list``, ``drain``, ``resume``, ``restart``, and ``gpuinfer task``, as they are typed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuinfer import Client
from gpuinfer.queue import keys
from gpuinfer.settings import Settings
from tests.integration.test_queue_cli import Cli
from tests.services import RedisServer
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.integration

HERE = f"gpu0@{socket.gethostname()}"


def notified(listener: socket.socket) -> list[str]:
    """Return the lines of STATUS that systemd was told."""
    found: list[str] = []
    while True:
        try:
            lines = listener.recv(4096).decode().splitlines()
        except BlockingIOError:
            return found
        found += [line for line in lines if line.startswith("STATUS=")]


def test_a_worker_is_drained_and_resumed(
    workers: Workers,
    redis_server: RedisServer,
    settings_for: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It finishes, stays up, says so to systemd and in the list, and takes what waits once it is resumed.

    Beside it ``gpuinfer task``: what became of the tasks, by person and by program.
    """
    cli = Cli(redis_server)
    assert cli("worker", "list").stdout == (
        "no worker is running; the watcher starts one when tasks wait (see gpuinfer watcher explain)\n"
    )
    unknown = cli.json("worker", "drain", "0", code=66)
    assert unknown["error"]["code"] == "unknown_worker"
    told: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        workers.start()
        monkeypatch.delenv("NOTIFY_SOCKET")
        with Client(settings_for(redis_server)) as client:
            assert client.result(client.submit([[[0.0] * 8] * 8]), timeout_s=60)["label"]
            assert cli.json("worker", "drain", "0") == [{"worker": HERE, "drained": True, "changed": True}]
            assert cli("worker", "drain", HERE).stdout == f"{HERE}: was already drained\n"
            waits = client.submit([[[0.0] * 8] * 8])
            assert cli("worker", "drain", "0", "--wait", "--timeout", "60").returncode == 0

            def said() -> bool:
                told.extend(notified(listener))
                return "drained, takes nothing until gpuinfer worker resume 0" in told[-1]

            wait_until(said, 60)
            (one,) = cli.json("worker", "list")
            assert (one["worker"], one["state"], one["drained"]) == (HERE, "drained", True)
            assert one["versions"]["digits"].startswith("sha256:")
            assert client.status(waits).state == "queued"
            shown = cli.json("task", "show", waits)
            assert (shown["status"], shown["position"]) == ("queued", 1)
            assert cli("worker", "resume", "0").stdout == f"{HERE}: takes tasks again\n"
            assert client.result(waits, timeout_s=60)["label"]
    with redis_server.client() as connection:
        assert connection.exists(keys.DRAINED) == 0
    shown = cli.json("task", "show", waits, "--wait", "5")
    assert (shown["status"], shown["worker"], shown["result"]["model"]) == ("completed", HERE, "digits")
    lines = cli("task", "show", waits).stdout.splitlines()
    assert ["status", "completed"] in [line.split() for line in lines]
    listed = cli.json("task", "list", "--limit", "1", "--model", "digits")
    assert [task["id"] for task in listed["tasks"]] == [waits]
    assert f"for older tasks: --before {listed['before']}" in cli("task", "list", "--limit", "1").stdout
    assert cli("task", "list", "--status", "failed").stdout == "no matching task has ended\n"
    assert cli.json("task", "retry", waits, code=65)["refused"][waits]["code"] == "wrong_state"
    assert cli("task", "cancel", waits).returncode == 1
    assert cli.json("task", "show", "nobody", code=66)["error"]["code"] == "task_not_found"
    assert completed(cli, "task", "show", "") >= {waits}
    assert completed(cli, "task", "list", "--model", "di") == {"digits"}
    assert completed(cli, "worker", "drain", "") == {"0", HERE}


def completed(cli: Cli, *words: str) -> set[str]:
    """Return what the shell offers in place of the last word."""
    asks = Cli.__new__(Cli)
    asks.environment = cli.environment | {
        "_GPUINFER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("gpuinfer", *words)),
        "COMP_CWORD": str(len(words)),
    }
    return {line.rpartition(",")[2] for line in asks().stdout.splitlines()}


def test_restart_is_systemds(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the unit of this host's worker; what cannot be is said, with what would be right."""
    calls, fake = tmp_path / "calls", tmp_path / "systemctl"
    fake.write_text(
        f"""#!/bin/sh
[ "$1" != show ] || case "$3" in
    *@4.service) echo ActiveState=inactive; echo UnitFileState=enabled; exit ;;
    *@5.service) echo UnitFileState=disabled; echo ActiveState=inactive; exit ;;
    *@6.service) echo UnitFileState=disabled; echo ActiveState=failed; exit ;;
    *) echo UnitFileState=disabled; echo ActiveState=active; exit ;;
esac
echo "$@" >>{calls}
[ "$2" != gpuinfer-worker@3.service ] || {{ echo gone >&2; exit 5; }}
"""
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    cli = Cli(redis_server)
    done = cli("worker", "restart", "0", "1", "--json")
    assert [one["worker"] for one in json.loads(done.stdout)] == [HERE, HERE.replace("gpu0", "gpu1")]
    assert calls.read_text() == "restart gpuinfer-worker@0.service\nrestart gpuinfer-worker@1.service\n"
    assert cli.json("worker", "restart", "3", code=69)["error"]["message"].endswith("@3.service: gone")
    elsewhere = cli.json("worker", "restart", "gpu0@elsewhere", code=64)
    assert "run gpuinfer worker restart 0 on elsewhere" in elsewhere["error"]["message"]
    calls.write_text("")
    never = cli.json("worker", "restart", "0", "5", code=66)["error"]["message"]
    assert never.endswith("is not enabled; to start it: systemctl start gpuinfer-worker@5.service")
    assert calls.read_text() == "", "nothing is restarted where one of them cannot be"
    told = cli("worker", "restart", "0", "4", "6").stdout.splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        "restarted, and ready",
        *(["did not run: started, and ready"] * 2),
    ]
