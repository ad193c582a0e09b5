# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer serve`` as a developer uses it: one command, the printed curl, an edit, an error, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import models_for_tests as build
from tests.conftest import need
from tests.integration.test_demo import Place, new_place
from tests.services import Process, redis_binary

pytestmark = pytest.mark.integration

SERVE = (sys.executable, "-m", "gpuinfer", "serve")
MODEL = """class Upper:
    example = "it's me"

    def predict(self, batch: list[str]) -> list[str]:
        return [text.upper() for text in batch]
"""


@pytest.fixture
def place() -> Iterator[Place]:
    need(redis_binary() is not None, "redis-server")
    with new_place() as made:
        yield made


def serving(place: Place, *arguments: object) -> Process:
    """Start it on a free port, on the CPU."""
    command = [*SERVE, *map(str, arguments), "--port", "0", "--device", "cpu"]
    return Process(command, place.folder / "output", env=place.env)


def wait_until_ready(process: Process, times: int) -> None:
    """Wait until it has told so this often of the model, beside redis, api and worker."""
    until = time.monotonic() + 120
    while len(re.findall(r"ready after [\d.]+ s$", process.text(), re.M)) < times + 3:
        assert process.running and time.monotonic() < until, process.text()
        time.sleep(0.05)


def curl(process: Process) -> dict[str, Any]:
    """Run the command that was printed, as a shell does, and return what it prints."""
    (command,) = re.findall(r"(?m)^  (curl .*)$", process.text())
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_from_a_python_file_to_an_answer(place: Place, tmp_path: Path) -> None:
    """One command; the curl that it prints answers; an edit is served, an error is shown where it stands, and
    mended by the next edit; Ctrl-C ends it all, and the file's folder is as it was."""
    file = tmp_path / "upper.py"
    file.write_text(MODEL)
    with serving(place, file, "--reload") as process:
        process.wait_for_line("Ctrl-C ends it", 120)
        answer = curl(process)
        assert answer["status"] == "completed", process.text()
        assert answer["result"]["output"] == "IT'S ME"
        file.write_text(MODEL.replace("text.upper()", "text.uper()"))
        process.wait_for_line(r"no attribute 'uper' \(upper.py, line 5\)", 120)
        process.wait_for_line("not served; waiting for a change", 120)
        file.write_text(MODEL.replace("text.upper()", "text.lower()"))
        wait_until_ready(process, 2)
        assert curl(process)["result"]["output"] == "it's me"
        told = len(process.text())  # the model's own trace, of its error, is in there
        process.send(signal.SIGINT)
        assert process.wait(60) == 0, process.text()
        assert "Traceback" not in process.text()[told:]
    place.assert_clean()
    assert [path.name for path in tmp_path.iterdir()] == ["upper.py"]


def test_from_a_torchscript_file_to_an_answer(place: Place, tmp_path: Path) -> None:
    """A file alone will do: its manifest is written from its first layer."""
    folder = build.perceptron(tmp_path / "mlp")
    file = (folder / "model.pt").rename(tmp_path / "net.pt")
    with serving(place, file) as process:
        process.wait_for_line("Ctrl-C ends it", 120)
        assert len(curl(process)["result"]["outputs"]["output"]) == 10
        process.send(signal.SIGTERM)
        assert process.wait(60) == 143, process.text()
    place.assert_clean()


def test_a_model_that_cannot_be_loaded_ends_it(place: Place, tmp_path: Path) -> None:
    """The error has file and line, the exit code is the model's, and nothing is left."""
    (tmp_path / "bad.py").write_text("class Bad:\n    def predict(self, batch)\n        return batch\n")
    with serving(place, tmp_path / "bad.py") as process:
        assert process.wait(120) == 65, process.text()
        assert "(bad.py, line 2)" in process.text()
        assert "Traceback" not in process.text()
    place.assert_clean()
