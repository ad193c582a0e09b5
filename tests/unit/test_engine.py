# SPDX-License-Identifier: Apache-2.0
"""The inference thread: bad neighbours, memory that runs out, a device that is lost.

The models are real; memory errors are injected, there being no GPU whose memory could run out.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpuinfer.errors import (
    DeviceError,
    DeviceOutOfMemory,
    InferenceError,
    ShapeMismatch,
    SoftTimeLimitExceeded,
)
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.loader import load
from gpuinfer.models.repository import Repository
from gpuinfer.models.tensors import Item
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.message import Envelope
from gpuinfer.worker.buffer import Batch, Part
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import Done, Engine
from gpuinfer.worker.passes import RunAlone
from gpuinfer.worker.sizes import Sizes
from gpuinfer.worker.task import Task
from tests.models_for_tests import picky

pytestmark = pytest.mark.unit


class Small:
    """A loaded model on a device that only takes batches up to ``fits``."""

    def __init__(self, model: LoadedModel, fits: int = 1000, device: str = "cpu") -> None:
        self._model, self.fits, self.device = model, fits, device
        self.manifest, self.name = model.manifest, model.name
        self.sizes: list[int] = []
        self.lost = False
        self.prepares, self.finishes, self.runs_code = model.prepares, model.finishes, model.runs_code
        self.prepare, self.finish = model.prepare, model.finish
        self.prepares_these, self.stage, self.land = model.prepares_these, model.stage, model.land
        #: Tells items that are too much for the device together.
        self.too_much: Callable[[Sequence[Item]], bool] = lambda _: False
        #: Called in each pass, and in each probe.
        self.watch: Callable[[], object] = lambda: None
        self.probes = 0

    def probe(self) -> None:
        self.watch()
        self.probes += 1
        self._answer()
        if not self.fits:
            raise DeviceOutOfMemory("CUDA out of memory")

    def _answer(self) -> None:
        if self.lost:
            raise DeviceError("CUDA error: an illegal memory access was encountered")

    def launch(self, items: Sequence[Item]) -> Any:
        self.watch()
        self.sizes.append(len(items))
        self._answer()
        if len(items) > self.fits or self.too_much(items):
            raise DeviceOutOfMemory("CUDA out of memory")
        return self._model.launch(items)

    def release_cache(self) -> None:
        self._model.release_cache()


@pytest.fixture
def model(tmp_path: Path) -> Small:
    picky(tmp_path / "picky")
    return Small(load(Repository([tmp_path]).get("picky"), "cpu"))


@pytest.fixture
def engine(model: Small) -> Iterator[Engine]:
    deadline = Deadline(lambda: None)
    made = Engine({"picky": model}, Sizes({"picky": 64}), deadline, lambda: None)  # type: ignore[dict-item]
    yield made
    made.close()
    deadline.close()


def work(value: object, number: int = 1) -> Task:
    return Task(
        claimed=Claimed(number, "realtime", 9, json.dumps(value).encode()),
        envelope=Envelope({}, {}, {}, "gpuinfer.predict", f"task-{number}", 0, 0),
        model="picky",
        inputs=[value],
        top_k=None,
        encoding="list",
        soft_limit_s=10,
        hard_limit_s=20,
        expires_at=None,
    )


def run(engine: Engine, values: Sequence[object]) -> Done:
    parts = tuple(Part(work(value, i), 0, 1) for i, value in enumerate(values))
    engine.submit(Batch("picky", parts, 10, 20))
    return engine.done.get(timeout=60)


def test_one_outcome_for_each_input(engine: Engine, model: Small) -> None:
    """A batch is one pass, and outcomes come in the order of the inputs."""
    done = run(engine, [[float(i)] for i in range(10)])
    assert model.sizes == [10]
    assert all(isinstance(outcome, dict) for outcome in done.outcomes)
    assert len({json.dumps(outcome) for outcome in done.outcomes}) == 10


def test_the_culprit_stands_alone(engine: Engine, model: Small) -> None:
    """A pass that fails is halved until only the failing input has failed; bad ones never reach it."""
    values: list[object] = [[1.0]] * 32
    values[5], values[20], values[21] = [-1.0], [1.0, 2.0], "x"
    outcomes = run(engine, values).outcomes
    failed = {i: type(o) for i, o in enumerate(outcomes) if isinstance(o, Exception)}
    assert failed[5] is InferenceError
    assert failed[20] is ShapeMismatch
    assert set(failed) == {5, 20, 21}
    assert len(model.sizes) < 14


def test_memory_that_runs_out(engine: Engine, model: Small) -> None:
    """Out of memory halves the batch until it fits, and the size that fits is remembered."""
    model.fits = 10
    outcomes = run(engine, [[float(i)] for i in range(40)]).outcomes
    assert all(isinstance(outcome, dict) for outcome in outcomes)
    assert model.sizes[:3] == [40, 20, 10]
    assert engine.limit("picky") == 10
    model.sizes.clear()
    run(engine, [[float(i)] for i in range(40)])
    assert model.sizes == [10, 10, 10, 10]


def test_one_large_input_is_not_the_batch(engine: Engine, model: Small) -> None:
    """An input that fits only alone does not make the batches of all others smaller for good."""

    def crowded(items: Sequence[Item]) -> bool:
        return len(items) > 1 and any(item[0][0] == 7.0 for item in items)

    model.too_much = crowded
    values = [[1.0]] * 63
    values.insert(40, [7.0])
    assert all(isinstance(outcome, dict) for outcome in run(engine, values).outcomes)
    assert all(isinstance(outcome, dict) for outcome in run(engine, [[1.0], [7.0]]).outcomes)
    assert engine.limit("picky") == 64


def test_what_cannot_even_be_read_fails_alone(
    engine: Engine, model: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an input does to the code around the model, its neighbours are answered."""

    decode = model.prepare

    def fragile(values: Sequence[object]) -> Any:
        if [13.0] in values:
            raise ZeroDivisionError("13")
        return decode(values)

    monkeypatch.setattr(model, "prepare", fragile)
    outcomes = run(engine, [[1.0], [13.0], [2.0]]).outcomes
    assert [isinstance(outcome, InferenceError) for outcome in outcomes] == [False, True, False]
    assert model.sizes == [2]


def test_not_even_one_fits(engine: Engine, model: Small) -> None:
    """An input that does not fit alone fails, as an error that may pass."""
    model.fits = 0
    (outcome,) = run(engine, [[1.0]]).outcomes
    assert isinstance(outcome, DeviceOutOfMemory)
    assert outcome.transient


def test_a_lost_device_ends_the_engine(engine: Engine, model: Small) -> None:
    """A device that cannot go on is reported with its words; no outcome is made up."""
    model.lost = True
    done = run(engine, [[1.0]])
    assert isinstance(done.fatal, DeviceError)
    assert "illegal memory access" in str(done.fatal)
    assert done.outcomes == []


def test_who_waits_is_not_woken(engine: Engine, model: Small) -> None:
    """A batch is handed to the one who waits for it; one that takes longer is told by a wake."""
    woken = threading.Event()
    engine.wake = woken.set
    parts = (Part(work([1.0]), 0, 1),)
    engine.submit(Batch("picky", parts, 10, 20))
    assert engine.wait(60) is not None
    go_on = threading.Event()
    model.watch = lambda: go_on.wait(60)
    woken.clear()
    engine.submit(Batch("picky", parts, 10, 20))
    assert engine.wait(0.01) is None
    go_on.set()
    assert woken.wait(60)
    assert not engine.done.empty()


def test_a_shared_pass_fails_nobody_for_its_time(engine: Engine, model: Small) -> None:
    """Halves of a batch share its time, and tasks the smallest limit: what is left over runs again, alone."""
    model.fits = 1
    model.watch = lambda: time.sleep(0.01)
    parts = tuple(Part(work([1.0], i), 0, 1) for i in range(2))
    engine.submit(Batch("picky", parts, 0.001, 20))
    assert [type(outcome) for outcome in engine.done.get(timeout=60).outcomes] == [RunAlone, RunAlone]
    engine.submit(Batch("picky", parts[:1], 0.001, 20))
    assert isinstance(engine.done.get(timeout=60).outcomes[0], SoftTimeLimitExceeded)
