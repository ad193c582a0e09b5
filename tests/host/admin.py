# SPDX-License-Identifier: Apache-2.0
"""What an administrator does on a host, as the tests do it: ask, start, look."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.host.container import Container

#: A handwritten 2.
TWO = (
    "[[[0,2,15,13,1,0,0,0],[0,13,12,14,7,0,0,0],[0,8,6,6,13,0,0,0],[0,0,0,5,15,0,0,0],"
    "[0,0,0,11,10,0,0,0],[0,0,2,16,5,0,0,0],[0,0,11,16,13,14,12,0],[0,3,16,14,8,8,7,0]]]"
)
API = "http://127.0.0.1:8080"
#: systemd's messages about a unit: it is told to stop, and it has started.
STOPPING, STARTED = "de5b426a63be47a7b6ac3eaac82e2f6f", "39f53479d3a045ac8e11786248231fbf"
#: How long a task may take to end before a test gives up: a worker that loads on a busy machine takes long.
END_S = 180.0


def properties(host: Container, unit: str, *names: str) -> dict[str, str]:
    """Return properties of a unit as ``systemctl show`` gives them."""
    said = host.ok(f"systemctl show {unit} -p {','.join(names)}")
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)


def main_pid(host: Container, unit: str) -> int:
    """Return a unit's main process, 0 when it has none."""
    return int(properties(host, unit, "MainPID")["MainPID"])


def ask(host: Container, request: str) -> dict[str, Any]:
    """Send a request with curl; while Redis is away (503), again, as Retry-After asks a client to."""
    # curl itself obeys Retry-After; the bodies of earlier answers stand before the last one's.
    said = host.ok(f"curl -s --retry 20 --retry-connrefused -w '\\n' {request}")
    body: dict[str, Any] = {}
    while said.strip():
        body, end = json.JSONDecoder().raw_decode(said.lstrip())
        said = said.lstrip()[end:]
    return body


def predict(host: Container, body: str = TWO, path: str = "/predict") -> str:
    """POST a request; return the task's id."""
    answer = ask(host, f"-d '{body}' {API}{path}")
    assert "task_id" in answer, answer
    return str(answer["task_id"])


def result(host: Container, task_id: str, wait: float | None = None) -> dict[str, Any]:
    """GET a task's state when it has ended (else after three minutes), or after ``wait`` seconds."""
    deadline = time.monotonic() + END_S
    while True:
        answer = ask(host, f"'{API}/result/{task_id}?wait={30 if wait is None else wait:g}'")
        assert "status" in answer, answer
        if wait is not None or answer["status"] not in ("queued", "running") or time.monotonic() > deadline:
            return answer


def journal(host: Container, *matches: str) -> list[dict[str, Any]]:
    """Return the journal's entries that match, oldest first."""
    said = host.ok(f"journalctl --sync; journalctl -o json --all --no-pager {' '.join(matches)}")
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def logged(host: Container, *matches: str) -> list[dict[str, Any]]:
    """Wait until the journal has an entry that matches; return those that do.

    A result can be read before its batch has a line.
    """
    host.until(f"journalctl --sync; journalctl -q -n 1 -o cat {' '.join(matches)} | grep -q .")
    return journal(host, *matches)


def active(host: Container, *units: str) -> None:
    """Wait until all of these units are active and no job for a unit of ours is left."""
    # `systemctl is-active` is content with one of several.
    jobs = "[ -z \"$(systemctl list-jobs --no-legend 'gpuinfer*')\" ]"
    host.until(" && ".join([jobs, *(f"systemctl is-active {unit}" for unit in units)]))


def ended(host: Container) -> list[str]:
    """Return the units of ours that were stopped, in the order in which they had stopped."""
    entries = journal(host, "_PID=1", "JOB_TYPE=stop", "JOB_RESULT=done")
    return [entry["UNIT"] for entry in entries if entry["UNIT"].startswith("gpuinfer")]


def actions(entries: list[dict[str, Any]]) -> list[str]:
    """Return the entries' ACTION fields, in order."""
    return [entry["ACTION"] for entry in entries if "ACTION" in entry]


def start_worker(host: Container, number: int = 0) -> None:
    """Start a worker, as if never before: earlier tests' starts do not count."""
    unit = f"gpuinfer-worker@{number}"
    host.ok(f"systemctl reset-failed {unit} 2>/dev/null; systemctl start {unit}")


def ready(host: Container, unit: str) -> None:
    """Wait until the worker that a unit runs now says that it serves."""
    run = f"_SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID {unit})"
    host.until(f"journalctl -q -o cat {run} ACTION=worker_ready | grep .", what=f"{unit}'s worker to serve")


def redis_cli(host: Container, *words: str) -> str:
    """Ask the host's Redis as its administrator; return what it answers."""
    login = "REDISCLI_AUTH=$(cat /etc/gpuinfer/credentials/admin) redis-cli --user admin"
    return host.ok(f"{login} -s /run/gpuinfer/redis/redis.sock {' '.join(words)}").strip()
