# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer logs``: what it asks journalctl for. What journalctl answers, the host tests show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpuinfer.errors import InputError
from gpuinfer.journal.cli import arguments

pytestmark = pytest.mark.unit

#: Prints its arguments, one a line.
ECHO = '#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n'


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command with ``folder`` as its only place for programs."""
    command = [sys.executable, "-m", "gpuinfer", "logs", *options]
    return subprocess.run(
        command, env={"PATH": str(folder)}, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], ["--unit=gpuinfer-*"]),
        (["--gpu", "7", "-n", "5"], ["--unit=gpuinfer-worker@7.service", "--lines=5"]),
        (
            ["--api", "--worker", "--watcher", "--redis"],
            [
                "--unit=gpuinfer-api.service",
                "--unit=gpuinfer-worker@*.service",
                "--unit=gpuinfer-watcher.service",
                "--unit=gpuinfer-redis.service",
            ],
        ),
        (
            ["--task", "a-b", "-f", "--json", "-n", "9"],
            ["--lines=9", "TASK_ID=a-b", "--follow", "--output=json"],
        ),
        (["--task", "a-b", "--api"], ["--unit=gpuinfer-api.service", "TASK_ID=a-b"]),
        (
            ["--since", "1 hour ago", "-p", "error"],
            ["--unit=gpuinfer-*", "--since=1 hour ago", "--priority=err"],
        ),
    ],
)
def test_what_is_asked(tmp_path: Path, options: list[str], wanted: list[str]) -> None:
    """Options are journalctl's own; without one, all our units are shown. Its exit code is ours."""
    (tmp_path / "journalctl").write_text(ECHO, encoding="utf-8")
    (tmp_path / "journalctl").chmod(0o755)
    done = run(tmp_path, *options)
    assert done.stdout.splitlines() == wanted
    assert done.returncode == 3


@pytest.mark.parametrize("task", ["", "a b", "x" * 201, "line\nbreak", "\x1b[2J"])
def test_ids(task: str) -> None:
    """What can be no id is refused by name, before journalctl sees it."""
    with pytest.raises(InputError, match="--task"):
        arguments([], task=task)


def test_without_journalctl(tmp_path: Path) -> None:
    """A host without systemd gets one sentence and exit code 69."""
    done = run(tmp_path, "--follow")
    assert done.returncode == 69
    assert done.stderr.startswith("gpuinfer: error: there is no journalctl here")
