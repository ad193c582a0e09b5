# SPDX-License-Identifier: Apache-2.0
"""Real workers whose GPU is lost, or hangs, while nothing is to do: they end, or are ended.

There is no GPU: a worker loads its model on the CPU, and finds it on a GPU that torch does not have.
"""

from __future__ import annotations

import json
import sys
import time

import pytest

from gpuinfer import Client
from gpuinfer.models.shipped import load_test_images
from tests.integration.conftest import Systemd
from tests.services import Process
from tests.workers import Workers

pytestmark = pytest.mark.integration

#: Runs ``gpuinfer ARGUMENTS`` with models that are on another GPU once they are warm, and tries that soon.
ELSEWHERE = """
import runpy, time
from gpuinfer.models.tensor_model import TensorModel
from gpuinfer.worker import bootstrap, engine, heartbeat
engine.PROBE_EVERY_S = engine.PROBE_PATIENCE_S = heartbeat.STUCK_GRACE_S = 0.5
load = bootstrap.load_models
def elsewhere(*arguments):
    loaded = load(*arguments)
    for model, _ in loaded.models.values():
        model.device = "cuda:99"
    return loaded
bootstrap.load_models = elsewhere
"""
RUN = 'runpy.run_module("gpuinfer", run_name="__main__")\n'
HANG = "TensorModel.probe = lambda _: time.sleep(600)\n"


def lines(worker: Process, action: str) -> list[dict[str, object]]:
    """Return what a worker's log says under an action."""
    found = [json.loads(line) for line in worker.lines() if line.startswith("{")]
    return [line for line in found if line["action"] == action]


def test_an_idle_worker_ends_with_its_gpu(workers: Workers, client: Client) -> None:
    """It ends with 74 though no task has met the GPU, and says what failed and what to do; others go on."""
    losing = workers.spawn(sys.executable, "-c", ELSEWHERE + RUN, "worker", "1", name="losing")
    losing.wait_for_line('"worker_ready"')
    assert losing.wait() == 74
    (told,) = lines(losing, "worker_ends")
    assert (told["level"], told["gpu"], told["code"]) == ("critical", 1, "device_unusable")
    assert "cuda:99 cannot be used" in str(told["reason"])
    assert "gpuinfer doctor" in str(told["hint"])
    images, labels = load_test_images()
    workers.start(0)
    assert client.result(client.submit(images[0].tolist()), timeout_s=60)["class"] == labels[0]


def test_a_gpu_that_hangs_starves_the_watchdog(systemd: Systemd, workers: Workers, client: Client) -> None:
    """A driver that does not come back: said once; no sign of life, no task taken; a stop ends it."""
    hanging = workers.spawn(sys.executable, "-c", ELSEWHERE + HANG + RUN, "worker", "1", name="hanging")
    hanging.wait_for_line('"worker_stuck"')
    systemd.rest()
    images, _ = load_test_images()
    task = client.submit(images[0].tolist())
    time.sleep(3)
    assert "WATCHDOG=1" not in systemd.rest()
    assert client.status(task).state == "queued"
    assert len(lines(hanging, "worker_stuck")) == 1
    assert hanging.terminate() == 0
