# SPDX-License-Identifier: Apache-2.0
"""Several processes of the front on one socket: one log, restarts, an orderly end."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from tests.apis import Api, HandWorker
from tests.services import RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_processes_on_one_socket(redis_server: RedisServer, worker: HandWorker, tmp_path: Path) -> None:
    """A killed one is restarted while others answer; a restart or a stop refuses nobody; the log is one."""
    worker.register()
    with Api(redis_server, tmp_path, api_processes=2) as api:
        first = children(api.process.pid)
        assert len(first) == 2
        refused: list[str] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                try:
                    httpx.post(f"{api.address}/predict", json=[1], timeout=60).raise_for_status()
                except httpx.ConnectError as exc:
                    refused.append(str(exc))
                except httpx.HTTPError:  # what the killed process had begun
                    continue

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: not _runs(first[0]), 60)
        untold = len(worker.claim(100_000))  # as many as that it may have accepted, and told nobody
        wait_until(lambda: bool(api.log("process_crashed")), 60)
        wait_until(lambda: len(set(children(api.process.pid)) - set(first)) == 1, 60)
        done.set()
        for thread in asking:
            thread.join(60)
        (crashed,) = api.log("process_crashed")
        assert (crashed["pid"], crashed["ended_with"]) == (first[0], "signal SIGKILL")
        assert refused == []
        # A caller that waits is told its task's state when all of them stop.
        answers: list[int] = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{api.address}/predict?wait=60", json=["x"], timeout=90).status_code
            )
        )
        before = len(worker.claim(100_000))
        waiting.start()
        wait_until(lambda: len(worker.claim(10)) == 1, 60)
        alive = children(api.process.pid)
        assert api.process.terminate() == 0
        waiting.join(60)
        assert answers == [202]
        assert not [pid for pid in alive if Path(f"/proc/{pid}").exists()]
        (counts,) = api.log("requests")
        assert untold + before + 1 >= counts["accepted"] >= before + 1


def test_children_end_with_their_parent(redis_server: RedisServer, tmp_path: Path) -> None:
    """A parent that is killed leaves nobody on its socket."""
    with Api(redis_server, tmp_path, api_processes=2) as api:
        orphans = children(api.process.pid)
        os.kill(api.process.pid, signal.SIGKILL)
        wait_until(lambda: not [pid for pid in orphans if _runs(pid)], 60)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
