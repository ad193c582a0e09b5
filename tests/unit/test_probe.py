# SPDX-License-Identifier: Apache-2.0
"""An idle worker tries its GPU: one that is lost, hangs, is full, or well; and a CPU, which is not tried.

There is no GPU: the model says that it is on one, and its probe does what the test wants.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpuinfer.errors import DeviceError
from gpuinfer.models.loader import load
from gpuinfer.models.repository import Repository
from gpuinfer.worker import engine as engine_module
from gpuinfer.worker.buffer import Batch, Part
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import PROBE_EVERY_S, Engine
from gpuinfer.worker.sizes import Sizes
from tests.models_for_tests import picky
from tests.unit.test_engine import Small, run, work
from tests.workers import wait_until

pytestmark = pytest.mark.unit


@pytest.fixture
def model(tmp_path: Path) -> Small:
    picky(tmp_path / "picky")
    return Small(load(Repository([tmp_path]).get("picky"), "cpu"), device="cuda:0")


@pytest.fixture
def woken() -> threading.Event:
    return threading.Event()


@pytest.fixture
def engine(model: Small, woken: threading.Event) -> Iterator[Engine]:
    deadline = Deadline(lambda: None)
    made = Engine({"picky": model}, Sizes({"picky": 64}), deadline, lambda: None)  # type: ignore[dict-item]
    made.probed = woken.set
    yield made
    made.close()
    deadline.close()


def idle(engine: Engine, seconds: float = PROBE_EVERY_S) -> None:
    """Let it be idle for so long, and have it looked at."""
    engine.moved_at = time.monotonic() - seconds
    engine.probe()


def test_an_idle_gpu_is_tried_once_in_a_while(engine: Engine, model: Small, woken: threading.Event) -> None:
    """Some seconds after the last batch or probe, not before; then the batcher is woken, and batches run."""
    engine.probe()
    idle(engine, PROBE_EVERY_S - 1)
    assert not engine.probing
    before = time.monotonic()
    idle(engine)
    engine.probe()
    assert woken.wait(60)
    assert (model.probes, engine.probing, engine.failed) == (1, False, None)
    assert engine.moved_at >= before
    assert isinstance(run(engine, [[4.0]]).outcomes[0], dict)


def test_a_busy_gpu_is_not_tried(engine: Engine, model: Small) -> None:
    """A batch finds out by itself."""
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    engine.submit(Batch("picky", (Part(work([1.0]), 0, 1),), 10, 20))
    idle(engine, 60)
    assert not engine.probing
    go_on.set()
    assert engine.done.get(timeout=60)
    assert model.probes == 0


def test_a_cpu_is_not_tried(tmp_path: Path) -> None:
    """It does not get lost: nothing is handed to the thread."""
    picky(tmp_path / "picky")
    model, deadline = Small(load(Repository([tmp_path]).get("picky"), "cpu")), Deadline(lambda: None)
    engine = Engine({"picky": model}, Sizes({"picky": 64}), deadline, lambda: None)  # type: ignore[dict-item]
    idle(engine, 600)
    assert not engine.probing
    engine.close()
    deadline.close()
    assert model.probes == 0


def test_a_lost_gpu_is_found_out(engine: Engine, model: Small, woken: threading.Event) -> None:
    """The driver's words are kept, and it stays closed for batches: its process ends."""
    model.lost = True
    idle(engine)
    assert woken.wait(60)
    assert isinstance(engine.failed, DeviceError)
    assert "illegal memory access" in str(engine.failed)
    assert engine.probing
    idle(engine)
    assert model.probes == 1


def test_a_full_gpu_is_not_lost(engine: Engine, model: Small, woken: threading.Event) -> None:
    """Another program may have filled it: said once, and the worker goes on."""
    model.fits = 0
    with capture_logs() as logs:
        for _ in range(3):
            woken.clear()
            idle(engine)
            assert woken.wait(60)
    assert (model.probes, engine.probing, engine.failed) == (3, False, None)
    assert [line["event"] for line in logs] == ["gpu_full"]


def test_a_gpu_that_hangs_does_not_hold_up_the_end(
    engine: Engine, model: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that the driver does not let go of is left behind."""
    monkeypatch.setattr(engine_module, "PROBE_PATIENCE_S", 0.05)
    go_on, begun = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        go_on.wait(60)

    model.watch = hang
    idle(engine)
    assert begun.wait(60)
    engine.close()
    assert engine.probing, "it has not waited for what goes on until the next line"
    go_on.set()
    wait_until(lambda: not engine.probing)
    idle(engine)
    assert not engine.probing, "nothing is tried after the end"
