# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that need a GPU; ``tests/gpu/run`` calls them, in a dry run with stubs.

Without that they are not collected: where there is no GPU nothing of them could be shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.gpus import Gpu, list_gpus
from gpuinfer.settings import Settings
from tests.gpu.records import tell_check
from tests.services import Process, RedisServer
from tests.workers import Workers

collect_ignore_glob = [] if "GPU_CHECK_RECORDS" in os.environ else ["test_*.py"]


@pytest.fixture
def workers(redis_server: RedisServer, tmp_path: Path) -> Iterator[Workers]:
    """Start workers on this test's Redis."""
    started = Workers(redis_server, tmp_path)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture
def client(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Iterator[Client]:
    """A client on this test's Redis."""
    with Client(settings_for(redis_server)) as opened:
        yield opened


@pytest.fixture
def gpu() -> Gpu:
    """The first GPU, as NVML has it."""
    found = list_gpus()
    assert found.gpus, found.reason
    return found.gpus[0]


def command(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a gpuinfer command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gpuinfer", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (environ or {}),
    )


def findings(*checks: str) -> list[dict[str, Any]]:
    """Return what the doctor finds."""
    done = command("doctor", *checks, "--json")
    assert done.stdout, done.stderr.strip().splitlines()[-1:]
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return found


def entries(process: Process, action: str) -> list[dict[str, Any]]:
    """Return a process's log lines under an action; of one in parts, whole."""
    whole = process.text().rpartition("\n")[0]  # the last line may be on its way
    found = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
    lines: list[dict[str, Any]] = []
    for line in found:
        if line.get("action") != action:
            continue
        if line.get("part", "1 ").startswith("1 "):
            lines.append(line)
        else:
            lines[-1]["task_ids"] += line["task_ids"]
    return lines


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # the hook's own way: yields once, and returns what it was given
    """Tell the run of each test as soon as it has ended; one that was skipped has shown nothing."""
    report: Any = yield
    if call.when == "call" or not report.passed:
        text: str = getattr(getattr(item, "obj", None), "__doc__", None) or item.name
        what = " ".join(text.split("\n\n")[0].split()).rstrip(".")
        failure = "" if report.passed else f"{report.outcome}: {_why(call)}"
        tell_check(what, call.duration, failure)
    return report  # type: ignore[no-any-return]


def _why(call: pytest.CallInfo[None]) -> str:
    if call.excinfo is None:
        return "no reason"
    return f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0]
