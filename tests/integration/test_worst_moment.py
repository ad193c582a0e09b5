# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL of Redis at the worst moment, under each mode: what was acknowledged is counted afterwards.

Under everysec Redis postpones its write, not only its fsync, while a fsync is under way on a slow disk. The
disk here is made slow by stopping the thread of Redis that calls fsync (ptrace(2)).
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Literal

import pytest

from gpuinfer import Client
from gpuinfer.settings import RedisSettings, Settings
from tests.brokers import OurRedis, our_redis
from tests.conftest import need
from tests.workers import wait_until

pytestmark = pytest.mark.integration

#: ptrace's requests.
_SEIZE, _INTERRUPT = 0x4206, 0x4207
#: waitpid(2): for threads, too.
_WALL = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
BEFORE, AFTER = 50, 400


def _ptrace(request: int, thread: int) -> bool:
    """Call ptrace(2) for a thread of a child of ours; tell whether it was allowed."""
    return int(_LIBC.ptrace(request, thread, None, None)) == 0


def _fsync_thread(pid: int) -> int:
    """Return the id of Redis's thread that calls fsync for the append-only file."""
    for folder in Path(f"/proc/{pid}/task").iterdir():
        if (folder / "comm").read_text(encoding="utf-8").strip().startswith("bio_aof"):
            return int(folder.name)
    raise AssertionError("this Redis has no thread named bio_aof")


def _stop_fsync(pid: int) -> int:
    """Let no fsync of the append-only file end from now on; return the thread that stands."""
    thread = _fsync_thread(pid)
    need(_ptrace(_SEIZE, thread), f"ptrace of a child ({os.strerror(ctypes.get_errno())})")
    assert _ptrace(_INTERRUPT, thread)
    os.waitpid(thread, _WALL)  # until it stands
    return thread


def _lost(server: OurRedis, mode: Literal["always", "everysec"]) -> tuple[int, int]:
    """Submit, kill Redis at the worst moment, start it again; return what is gone of the first and last."""
    settings = Settings.model_validate({"broker": server.login("api")})
    with Client(settings) as client, server.client() as admin:
        pid = int(admin.info("server")["process_id"])
        first = [client.submit([1.0]) for _ in range(BEFORE)]
        thread = _stop_fsync(pid)
        first.append(client.submit([1.0]))
        if mode == "everysec":  # a second after the last fsync the next one is asked for, and stands
            wait_until(lambda: int(admin.info("persistence")["aof_pending_bio_fsync"]) > 0)
        last = client.submit_many([[1.0]] * AFTER)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(thread, _WALL)  # or the process would not be gone
    server.kill()
    server.start()
    with server.client() as admin:
        text = b"".join(admin.lrange("realtime", 0, -1)).decode()
    return sum(one not in text for one in first), sum(one not in text for one in last)


def test_a_kill_at_the_worst_moment_under_always() -> None:
    """Each task that was acknowledged is there."""
    with our_redis(settings=RedisSettings(maxmemory_mb=256, appendfsync="always")) as server:
        assert _lost(server, "always") == (0, 0)


def test_a_kill_at_the_worst_moment_under_everysec() -> None:
    """What was acknowledged within the last two seconds is gone, which is what is said; nothing before it."""
    with our_redis(settings=RedisSettings(maxmemory_mb=256, appendfsync="everysec")) as server:
        before, last = _lost(server, "everysec")
    assert before == 0
    assert 0 < last <= AFTER
