# SPDX-License-Identifier: Apache-2.0
"""The tests' own services: what they start is private, restarts in place, and never survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import RedisFactory
from tests.services import Process, RedisServer, ServiceError

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_soon(pid: int) -> bool:
    until = time.monotonic() + 60
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_two_servers_share_nothing(redis_factory: RedisFactory) -> None:
    """No port, no file, no key in common."""
    one, two = redis_factory(), redis_factory()
    with one.client() as first, two.client() as second:
        first.set("key", "value")
        assert second.get("key") is None
        assert first.config_get("port")["port"] == "0"


def test_an_append_only_server_keeps_what_it_had(redis_factory: RedisFactory) -> None:
    """kill() and start() are a crash and a restart, on the same socket."""
    server = redis_factory(appendonly="yes", appendfsync="always")
    with server.client() as client:
        client.set("key", "value")
    server.kill()
    assert not alive(server.pid)
    server.start()
    with server.client() as client:
        assert client.get("key") == b"value"


def test_a_server_that_cannot_start_says_why() -> None:
    """The end of its log is in the error, and its folder is gone."""
    with pytest.raises(ServiceError, match="maxmemory"):
        RedisServer(maxmemory="nonsense")


def test_closing_leaves_nothing(redis_factory: RedisFactory) -> None:
    """Neither process nor folder."""
    server = redis_factory()
    pid, folder = server.pid, server.folder
    server.close()
    assert not alive(pid)
    assert not folder.exists()
    folder.mkdir()  # the fixture closes it once more


def test_kill_takes_the_whole_group(tmp_path: Path) -> None:
    """A child that the command has started goes with it."""
    script = "sleep 600 & echo child $!; wait"
    with Process(["bash", "-c", script], tmp_path / "log") as process:
        child = int(process.wait_for_line("^child").split()[1])
    assert process.returncode == -signal.SIGKILL
    assert gone_soon(child)


def test_waiting_for_a_line_ends_with_the_process(tmp_path: Path) -> None:
    """The error tells how it ended, and shows its log."""
    with (
        Process(["bash", "-c", "echo sorry; exit 3"], tmp_path / "log") as process,
        pytest.raises(ServiceError, match=r"(?s)ended with 3.*sorry"),
    ):
        process.wait_for_line("ready")


def test_nothing_survives_a_killed_pytest() -> None:
    """SIGKILL to the test run itself: the kernel ends the server."""
    script = (
        "import time; from tests.services import RedisServer\n"
        "server = RedisServer(); print(server.pid, server.folder, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid, folder = run.stdout.readline().split()
        assert alive(int(pid))
        os.kill(run.pid, signal.SIGKILL)
    assert gone_soon(int(pid))
    subprocess.run(["rm", "-r", folder], check=True)
