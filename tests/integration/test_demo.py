# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer demo`` as a user runs it: its figures, its looks, its end, and that nothing is left."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpuinfer.models.shipped import load_test_images
from tests.conftest import need
from tests.services import Process, redis_binary

pytestmark = pytest.mark.integration

DEMO = (sys.executable, "-m", "gpuinfer", "demo")
#: What a shell of a developer may hold; none of it may reach the demo.
FOREIGN = {
    "GPUINFER_BROKER_URL": "redis://127.0.0.1:1/0",
    "GPUINFER_NONSENSE": "1",
    "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
    "CREDENTIALS_DIRECTORY": "/nonexistent",
}


class Place:
    """A TMPDIR of one test: every process of a demo bears its path in its environment or command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, **FOREIGN, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}

    def start(self, *options: str) -> Process:
        """Start a demo without a terminal; its output is ``text()``."""
        return Process([*DEMO, *options], self.folder / "output", env=self.env)

    def processes(self) -> dict[int, str]:
        """Return pid -> command of the living processes that belong to this place."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                text = command + (entry / "environ").read_bytes()
            except OSError:  # it has just ended
                continue
            if str(self.folder).encode() in text:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
        return found

    def pid_of(self, pattern: str) -> int:
        """Return the process whose command matches."""
        return next(pid for pid, command in self.processes().items() if re.search(pattern, command))

    def assert_clean(self) -> None:
        """Neither a process nor the temporary folder is left."""
        assert self.processes() == {}
        assert list(self.folder.glob("gpuinfer-*")) == []

    def wait_until_no_processes(self, timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.02)
        assert left == {}


@contextmanager
def new_place() -> Iterator[Place]:
    """Make a place, and remove it in the end."""
    folder = Path(tempfile.mkdtemp(prefix="gi-demo-"))  # short: a socket's path may have 107 bytes
    try:
        yield Place(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place() -> Iterator[Place]:
    need(redis_binary() is not None, "redis-server")
    with new_place() as made:
        yield made


def test_it_ends_by_itself_with_figures_and_leaves_nothing(place: Place) -> None:
    """All test images are answered over HTTP, each as the model answers directly; exit code 0."""
    done = subprocess.run(
        [*DEMO, "--json", "--rounds", "1"],
        env=place.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    place.assert_clean()
    found: dict[str, Any] = json.loads(done.stdout)
    count = len(load_test_images()[1])
    realtime, batch = found["tiers"]["realtime"], found["tiers"]["batch"]
    assert realtime["requests"] == realtime["images"] == found["test_images"] == count
    assert batch["images"] == count * batch["requests"] > 0
    assert realtime["equals_direct"] and batch["equals_direct"] and found["ok"]
    assert realtime["accuracy"] == batch["accuracy"] == found["direct_accuracy"] >= 0.98
    assert 0 < realtime["p50_ms"] <= realtime["p99_ms"] <= realtime["seconds"] * 1e3
    assert found["workers"] == 2
    assert found["mean_batch_size"] > 1
    assert found["batches"] * found["mean_batch_size"] == pytest.approx(
        realtime["images"] + batch["images"], rel=0.01
    )


def test_plain_lines_and_a_table_without_a_terminal(place: Place) -> None:
    """A pipe gets whole lines without control characters: progress, the table, and how to go on."""
    with place.start("--rounds", "1", "--workers", "1") as demo:
        assert demo.wait(120) == 0, demo.tail()
    text = demo.text()
    assert "\x1b" not in text and "\r" not in text
    assert re.search(r"^worker 0 on .*: ready after [\d.]+ s$", text, re.M)
    assert re.search(r"^realtime 360 of 360; batch [1-9]\d* jobs of 360 images done$", text, re.M)
    assert re.search(r"^tier +requests +accuracy +equal to direct +images/s +p50 +p99", text, re.M)
    assert len(re.findall(r"^(realtime|batch) .* yes, image by image ", text, re.M)) == 2
    assert "Next steps" in text
    place.assert_clean()


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [(signal.SIGTERM, 143, "^api: ready"), (signal.SIGINT, 130, "^realtime [1-9]")],
    ids=["SIGTERM while it starts", "SIGINT in the burst"],
)
def test_a_signal_cleans_up(place: Place, number: signal.Signals, code: int, moment: str) -> None:
    """Ctrl-C and SIGTERM end everything at any moment, with the exit code that a shell gives."""
    with place.start("--rounds", "50") as demo:
        demo.wait_for_line(moment)
        assert len(place.processes()) >= 5
        demo.send(number)
        assert demo.wait(120) == code
        assert "Traceback" not in demo.text()
    place.assert_clean()


def test_sigkill_leaves_no_children(place: Place) -> None:
    """Even a demo that cannot clean up takes its processes along."""
    with place.start("--rounds", "50") as demo:
        demo.wait_for_line("^realtime [1-9]")
        assert len(place.processes()) >= 5
        demo.send(signal.SIGKILL)
        demo.wait()
        place.wait_until_no_processes()


def test_a_worker_that_dies_fails_the_demo(place: Place) -> None:
    """The end of its log and how it ended are told; exit code 1."""
    with place.start("--rounds", "50") as demo:
        demo.wait_for_line("^realtime [1-9]")
        os.kill(place.pid_of(r"gpuinfer worker 1"), signal.SIGKILL)
        assert demo.wait(120) == 1
        assert "worker 1 was killed by SIGKILL" in demo.text()
        assert "the last lines of worker 1's log:" in demo.text()
    place.assert_clean()


def test_without_redis_it_says_what_to_install(place: Place) -> None:
    """A missing redis-server is told with the command that brings it."""
    if shutil.which("redis-server", path="/usr/sbin:/sbin"):
        pytest.skip("redis-server is in an sbin folder, where the demo looks without PATH")
    env = place.env | {"PATH": "/nonexistent"}
    done = subprocess.run(DEMO, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78
    assert "apt install redis-server" in done.stderr
    place.assert_clean()


class Terminal:
    """A demo on a pseudo-terminal of its own, where Ctrl-C is a key."""

    def __init__(self, place: Place, *options: str) -> None:
        pid, self._fd = pty.fork()
        if pid == 0:
            os.execve(sys.executable, [*DEMO, *options], place.env | {"TERM": "xterm-256color"})  # noqa: S606
        self.pid = pid
        self.text = ""

    def read_until(self, done: Callable[[str], bool], timeout_s: float = 120.0) -> None:
        """Read until the text is as wanted, or the demo has closed its terminal."""
        os.set_blocking(self._fd, False)
        until = time.monotonic() + timeout_s
        while not done(self.text) and time.monotonic() < until:
            try:
                self.text += os.read(self._fd, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # EIO: nobody holds the other end any more
                return

    def press(self, key: bytes) -> None:
        os.write(self._fd, key)

    def wait(self, timeout_s: float = 120.0) -> int:
        """Read to the end and return the exit code; a demo that does not end is killed."""
        self.read_until(lambda _: False, timeout_s)
        until = time.monotonic() + 60
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(ended[1])


def test_on_a_terminal_it_is_live_and_kept_until_ctrl_c(place: Place) -> None:
    """Bars move on a terminal; --keep leaves the API up and tells its address; Ctrl-C ends it, exit 0."""
    terminal = Terminal(place, "--keep", "--rounds", "1")
    try:
        terminal.read_until(lambda text: "Press Ctrl-C to stop it" in text)
        assert "\x1b[?25l" in terminal.text, "the cursor is hidden while bars move"
        assert "━" in terminal.text and "360/360" in terminal.text
        found = re.search(r"curl -s -d @(\S+) (http://\S+)/predict", terminal.text)
        assert found, terminal.text[-2000:]
        body, url = Path(found[1]).read_bytes(), found[2]
        task_id = httpx.post(f"{url}/predict", content=body).json()["task_id"]
        answer = httpx.get(f"{url}/result/{task_id}?wait=60", timeout=90).json()
        assert answer["result"]["class"] == int(load_test_images()[1][0])
        terminal.press(b"\x03")
    finally:
        code = terminal.wait()
    assert code == 0, terminal.text[-2000:]
    assert terminal.text.count("\x1b[?25h") >= 1, "the cursor is shown again"
    place.assert_clean()
