# SPDX-License-Identifier: Apache-2.0
"""Redis's lines with levels: its starts and stops are no warnings, what goes wrong is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import need
from tests.services import Process, redis_binary

pytestmark = pytest.mark.unit

RUN = Path(__file__).parents[2] / "systemd" / "run-redis"


def levels(*lines: str) -> list[str]:
    """Return what becomes of lines that Redis writes."""
    done = subprocess.run(
        [RUN, "printf", "%s\\n", *lines], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.splitlines()


def test_a_start_and_a_stop_are_no_warnings(tmp_path: Path) -> None:
    """From the first line of a real Redis to the last, which is not lost when all are told to end."""
    socket = tmp_path / "redis.sock"
    binary = redis_binary()
    need(binary is not None, "redis-server")
    command = [str(RUN), str(binary), "--port", "0", "--unixsocket", str(socket), "--save", ""]
    process = Process(command, tmp_path / "log")
    process.wait_for_line("eady to accept connections")
    process.terminate()
    process.wait_for_line("is now ready to exit")
    said = process.lines()
    assert "is now ready to exit" in said[-1]
    assert {line[:3] for line in said} == {"<5>"}, said


def test_trouble_is_a_warning() -> None:
    """What is not known to be harmless stays what Redis takes it for."""
    at = "7:M 28 Nov 2026 22:57:09.120"
    assert levels(
        f"{at} # Asynchronous AOF fsync is taking too long",
        f"{at} * Ready to accept connections",
        f"{at} - Accepted 127.0.0.1:1",
        f"{at} . 0 clients connected",
        "=== REDIS BUG REPORT START",
    ) == [
        "<4>Asynchronous AOF fsync is taking too long",
        "<5>Ready to accept connections",
        "<6>Accepted 127.0.0.1:1",
        "<7>0 clients connected",
        "<3>=== REDIS BUG REPORT START",
    ]
