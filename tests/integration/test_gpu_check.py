# SPDX-License-Identifier: Apache-2.0
"""The check on a GPU, without one: the kit is packed, and all parts run as they would there, on stubs.

The kit for this Python is packed into .cache, where a second run finds its wheels.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.gpu.kit import LIMIT_BYTES, size_of
from tests.gpu.parts import PARTS
from tests.services import Process, redis_binary
from tests.workers import UNTRACED, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
HERE = "{}.{}".format(*sys.version_info)
#: This machine may be busy.
PATIENCE = "4"

#: Runs the check with other parts: one that hangs, one that fails, and one that is well.
OTHER_PARTS = """
import sys
from tests.gpu import running
from tests.gpu.parts import Part
running.PARTS = (
    Part(name="hangs", arguments=("tests.gpu.holder", "0"), limit_s=2),
    Part(name="fails", arguments=("tests.gpu.nothing",), limit_s=60),
    Part(name="about", arguments=("tests.gpu.about",), limit_s=60),
)
raise SystemExit(running.main(sys.argv[1:]))
"""


def pack(python: str) -> Path:
    """Pack a kit for a Python, and return its folder."""
    into = ROOT / ".cache" / f"gpu-kit-{python}"
    command = [sys.executable, "-m", "tests.gpu.packing", "--python", python, "--into", str(into), "--brief"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "MiB" in done.stdout
    return into


@pytest.fixture(scope="module")
def kit() -> Path:
    """The kit for this Python."""
    need(redis_binary() is not None, "redis-server")
    return pack(HERE)


class Place:
    """A TMPDIR of one test: the path stands in the environment of every process of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Beside the TMPDIR, so that nothing may be left in that.
        self.out = folder / "out"
        self.temporary = folder / "t"
        self.temporary.mkdir()
        self.env = os.environ | {"TMPDIR": str(self.temporary), "PYTHON": sys.executable}

    def start(self, kit: Path, command: Sequence[str], *parts: str) -> Process:
        """Start a dry run."""
        options = ("--dry-run", "--patience", PATIENCE, "--kit", str(kit), "--out", str(self.out))
        self.out.mkdir()
        return Process([*UNTRACED, *command, *options, *parts], self.out / "output", env=self.env, cwd=ROOT)

    def report(self) -> dict[str, Any]:
        """Return what the run has written."""
        found: dict[str, Any] = json.loads((self.out / "gpu-check.json").read_text())
        return found

    def processes(self) -> list[str]:
        """Return the commands of the living processes that belong to this place."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words, environment = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
            except OSError:  # it has just ended
                continue
            if str(self.temporary).encode() in words + environment:  # Redis overwrites its environment
                found.append(words.replace(b"\0", b" ").decode())
        return found

    def assert_clean(self) -> None:
        """Neither a process nor a folder is left."""
        assert self.processes() == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="gi-dry-"))  # short: a socket's path may have 107 bytes
    try:
        yield Place(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_kit_for_the_gpu_machine_is_packed() -> None:
    """Wheels for Python 3.12, our own, a redis-server that starts with its own libraries; 60 MiB at most."""
    need(redis_binary() is not None, "redis-server")
    kit = pack("3.12")
    assert size_of(kit) <= LIMIT_BYTES
    wheels = [wheel.name for wheel in (kit / "wheels").iterdir()]
    assert any(name.startswith("pydantic_core-") and "-cp312-" in name for name in wheels)
    assert not [name for name in wheels if "-cp311-cp311-" in name]
    assert sum(name.startswith("gpuinfer-") for name in wheels) == 1
    said = subprocess.run(
        [kit / "redis" / "redis-server", "--version"], env={}, check=True, capture_output=True, text=True
    )
    assert "v=" in said.stdout


def test_a_dry_run_of_all_parts(place: Place, kit: Path) -> None:
    """Each part checks something and passes; table and JSON name them all; nothing is left."""
    with place.start(kit, ["tests/gpu/run"]) as run:
        assert run.wait(800) == 0, run.tail() + (place.out / "gpu-check.log").read_text()[-8000:]
    place.assert_clean()
    report, table = place.report(), (place.out / "gpu-check.txt").read_text()
    assert (report["ok"], report["dry_run"]) == (True, True)
    assert [part["name"] for part in report["parts"]] == ["unpack", *(part.name for part in PARTS)]
    assert all(part["checks"] for part in report["parts"] if part["name"] != "unpack")
    assert {row["model"] for row in report["figures"]} == {"perceptron", "convnet", "encoder"}
    assert {"card", "driver", "CUDA of torch", "torch", "Python", "gpuinfer"} <= report["about"].keys()
    assert "DRY RUN" in table and "all passed" in table
    assert table.strip() in run.text()


def test_a_part_that_hangs_or_fails_costs_itself_alone(place: Place, kit: Path) -> None:
    """It is stopped at its limit, the next ones run, and the run fails."""
    with place.start(kit, [sys.executable, "-c", OTHER_PARTS]) as run:
        assert run.wait(300) == 1, run.tail()
    place.assert_clean()
    found = {part["name"]: part for part in place.report()["parts"]}
    assert found["hangs"]["reason"].startswith("stopped at its limit")
    assert found["fails"]["reason"] == "exit status 1"
    assert found["about"]["ok"] and found["unpack"]["ok"]
    assert "FAILED: hangs, fails" in run.text()


def test_sigterm_leaves_nothing(place: Place, kit: Path) -> None:
    """A run that is ended in the midst of a part takes its workers, its Redis and its folder along."""
    with place.start(kit, ["tests/gpu/run"], "lost") as run:
        run.wait_for_line("^unpack: ok", timeout=120)
        until_a_worker_runs(place, run)
        run.send(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    place.assert_clean()


def until_a_worker_runs(place: Place, run: Process) -> None:
    """Wait until a worker and its Redis are there."""
    wait_until(
        lambda: (
            not run.running
            or all(
                any(word in command for command in place.processes())
                for word in ("gpuinfer worker", "redis-server")
            )
        ),
        timeout=120,
    )
    assert run.running, run.tail()


def test_without_a_kit_it_ends_at_once(place: Place) -> None:
    """It says what to do; exit code 64."""
    with place.start(place.folder / "nothing", ["tests/gpu/run"]) as run:
        assert run.wait(60) == 64
    assert "make one with tests/gpu/pack" in run.text()
    place.assert_clean()
