# SPDX-License-Identifier: Apache-2.0
"""A worker on the GPU from its start to its answers, and the demo."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.models.shipped import load_test_images
from tests.gpu.conftest import command, entries
from tests.workers import Workers

pytestmark = pytest.mark.gpu


class Notes:
    """What processes tell systemd: the receiving end of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(60)

    def until(self, line: str) -> float:
        """Return when that line came, by the wall clock."""
        while line not in self._socket.recv(4096).decode().splitlines():
            pass
        return time.time()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    """What is started from now on reports here."""
    listening = Notes(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield listening
    listening.close()


def test_ready_comes_after_the_warm_up_and_results_name_the_device(
    notes: Notes, workers: Workers, client: Client
) -> None:
    """READY comes when the model is loaded and warm on cuda:0, and each result says cuda:0."""
    worker = workers.start(0, ready=False)
    notes.until("READY=1")
    (loaded,) = entries(worker, "model_loaded")
    assert (loaded["model"], loaded["device"]) == ("digits", "cuda:0")
    assert loaded["max_batch_size"] > 1
    images, labels = load_test_images()
    results = client.results(client.submit_many(images[:64].tolist()), timeout_s=30)
    assert {result["device"] for result in results} == {"cuda:0"}
    right = sum(result["class"] == label for result, label in zip(results, labels, strict=False))
    assert right >= 62
    worker.wait_for_line('"batch_done"')  # a moment after the results
    assert {entry["device"] for entry in entries(worker, "batch_done")} == {"cuda:0"}
    assert worker.terminate() == 0


def test_the_demo_from_end_to_end() -> None:
    """The demo answers all requests on the GPU, each as the model on the CPU answers."""
    done = command("demo", "--json", "--rounds", "1", "--workers", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"] and found["devices"] == ["cuda:0"]
    assert all(tier["equals_direct"] and tier["failed"] == 0 for tier in found["tiers"].values())
