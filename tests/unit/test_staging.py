# SPDX-License-Identifier: Apache-2.0
"""Batches of arrays: which go ahead of the device, who stages them, and what becomes of those put back."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gpuinfer.errors import DeviceError, InferenceError
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import Engine
from gpuinfer.worker.pace import AHEAD_MOST_S, CLAIM_S, LONG_BATCH_S, Pace
from gpuinfer.worker.sizes import Sizes
from gpuinfer.worker.staging import WORTH_A_THREAD_S, Staging, Usual
from tests.unit.test_pipeline import LONG_S, Steps, batch, collect, until

pytestmark = pytest.mark.unit


class Staged(list[Any]):
    """What ``stage`` has made of items; a slice of it is a plain list."""


class Arrays(Steps):
    """A model whose inputs are decoded together, and staged; it has no code of its own before or after."""

    prepares = finishes = runs_code = False

    def __init__(self) -> None:
        super().__init__()
        #: The threads that staged, and the batches that were launched as they were staged.
        self.stagers: list[str] = []
        self.launched: list[bool] = []
        self.on_stage: Callable[[Sequence[Any]], Any] = Staged
        self.on_land: Callable[[Sequence[Any]], object] = lambda outputs: None

    def prepare(self, values: Sequence[object]) -> list[Any]:
        items = [self.on_prepare(value) for value in values]
        self.prepared += values
        return items

    def stage(self, items: Sequence[Any]) -> Any:
        self.stagers.append(threading.current_thread().name)
        return self.on_stage(items)

    def launch(self, items: Sequence[Any]) -> list[Any]:
        self.launched.append(isinstance(items, Staged))
        return self.forward(items)

    def land(self, outputs: Sequence[Any]) -> None:
        self.on_land(outputs)

    def finish(self, outputs: Sequence[Any], **_: Any) -> list[Any]:
        self.finished += outputs
        return [self.on_finish(output) for output in outputs]


class Known(Usual):
    """An estimate per item that no measurement changes: how long a step takes here depends on the machine."""

    def __init__(self, item_s: float) -> None:
        super().__init__()
        super().note("steps", 1, item_s)

    def note(self, model: str, size: int, seconds: float) -> None:
        """Learn nothing."""


@pytest.fixture
def model() -> Arrays:
    return Arrays()


@pytest.fixture
def engine(model: Arrays) -> Iterator[Engine]:
    deadline = Deadline(lambda: None)
    made = Engine({"steps": model}, Sizes({"steps": 2}), deadline, lambda: None, threads=2)
    made.pipeline.stager.usual = Known(1.0)  # it is worth a thread
    yield made
    made.close()
    deadline.close()


@pytest.fixture
def go_on(model: Arrays) -> Iterator[threading.Event]:
    """The device waits for it in each pass."""
    event = threading.Event()
    model.on_pass = lambda items: event.wait(LONG_S) and list(items)
    yield event
    event.set()


def running(engine: Engine, model: Arrays) -> None:
    """Have a batch on the device."""
    engine.submit(batch([0]))
    until(lambda: model.passes)


def test_a_full_batch_is_staged_while_another_runs(
    engine: Engine, model: Arrays, go_on: threading.Event
) -> None:
    """A thread before the device does it, and the device goes on to it by itself; one that is not full
    gathers."""
    running(engine, model)
    assert not engine.takes(batch([1]))
    assert engine.takes(batch([1, 2]))
    engine.submit(batch([1, 2]))
    assert not engine.takes(batch([3, 4]))
    until(lambda: len(model.stagers) == 2)
    assert model.passes == [[0]]
    assert [name.partition("-")[0] for name in model.stagers] == ["inference", "prepare"]
    go_on.set()
    assert [len(collect(engine).outcomes), len(collect(engine).outcomes)] == [1, 2]
    assert model.launched == [True, True]


def test_little_work_is_not_handed_to_a_thread(engine: Engine, model: Arrays, go_on: threading.Event) -> None:
    """The device's thread does it, as fast as another could be woken; the batch waits there all the same."""
    engine.pipeline.stager.usual = Known(WORTH_A_THREAD_S / 10)
    running(engine, model)
    engine.submit(batch([1, 2]))
    go_on.set()
    assert [len(collect(engine).outcomes), len(collect(engine).outcomes)] == [1, 2]
    assert model.stagers == ["inference"] * 2


def test_the_device_never_waits_for_a_thread_that_has_not_begun(model: Arrays) -> None:
    """It stages the batch itself; the thread that comes later finds nothing to do."""
    staging = Staging(lambda: model.stage([1]))
    assert staging.take() is None
    staging.work()
    assert not model.stagers
    failing = Staging(lambda: [1 // 0])
    failing.work()
    with pytest.raises(ZeroDivisionError):
        failing.take()


def test_what_is_staged_and_fails_is_halved_as_plain_items(engine: Engine, model: Arrays) -> None:
    """Its culprit stands alone; what cannot be decoded is not staged at all, and its neighbour runs."""

    def refuse(items: Sequence[Any]) -> list[Any]:
        if 7 in items:
            raise InferenceError("7")
        return list(items)

    model.on_pass = refuse
    engine.submit(batch([7, 1]))
    first, second = collect(engine).outcomes
    assert isinstance(first, InferenceError)
    assert second == {"output": 1}
    assert model.launched == [True, False, False]
    model.on_prepare = lambda item: InferenceError("8") if item == 8 else item
    engine.submit(batch([8, 1]))
    assert [type(outcome) for outcome in collect(engine).outcomes] == [InferenceError, dict]
    assert model.launched[3:] == [False]


def test_a_batch_that_goes_back_lets_go_of_what_is_staged(
    engine: Engine, model: Arrays, go_on: threading.Event
) -> None:
    """Its memory may be the device's; handed over again, it is staged again."""

    class Item:
        pass

    kept: list[weakref.ref[Item]] = []

    def stage(items: Sequence[Any]) -> Staged:
        item = Item()
        kept.append(weakref.ref(item))
        return Staged([*items[:-1], item])

    running(engine, model)
    model.on_stage = stage
    ahead = batch([1, 2])
    engine.submit(ahead)
    until(lambda: kept and not engine.pipeline.strays())
    assert engine.withdraw() is ahead
    gc.collect()
    assert kept[0]() is None
    model.on_stage = Staged
    engine.submit(ahead)
    go_on.set()
    collect(engine)
    assert [outcome["output"] for outcome in collect(engine).outcomes] == [1, 2]


def test_a_thread_that_still_stages_is_chargeable(
    engine: Engine, model: Arrays, go_on: threading.Event
) -> None:
    """Of a batch that was withdrawn meanwhile: a death in there is its own doing."""
    begun, slow = threading.Event(), threading.Event()
    running(engine, model)

    def prepare(item: Any) -> Any:
        begun.set()
        return slow.wait(LONG_S) and item

    model.on_prepare = prepare
    ahead = batch([1, 2])
    engine.submit(ahead)
    assert begun.wait(LONG_S)
    engine.withdraw()
    assert engine.chargeable == [*engine.batches, ahead]
    slow.set()
    until(lambda: engine.chargeable == engine.batches)


def test_results_are_rendered_while_the_next_batch_runs(engine: Engine, model: Arrays) -> None:
    """Where that takes a while, the device does not wait for it, nor for a copy of results; ends keep their
    order."""
    landed, second = threading.Event(), threading.Event()
    engine._rendering.note("steps", 1, 1.0)
    model.on_pass = lambda items: (second.wait(LONG_S) if items == [0] else True) and list(items)
    model.on_land = lambda outputs: landed.wait(LONG_S)
    engine.submit(batch([0]))
    engine.submit(batch([1, 2]))
    second.set()
    until(lambda: len(model.passes) == 2)
    assert engine.done.empty()
    landed.set()
    assert [len(collect(engine).outcomes), len(collect(engine).outcomes)] == [1, 2]


@pytest.mark.parametrize("behind", [False, True])
def test_a_device_that_is_lost_in_a_copy_of_results(engine: Engine, model: Arrays, behind: bool) -> None:
    """No outcome is made up, whoever has waited for the copy: the tasks come back."""

    def lost(_: Sequence[Any]) -> None:
        raise DeviceError("CUDA error: unspecified launch failure")

    engine._rendering.note("steps", 1, 1.0)
    second = threading.Event()
    model.on_pass = lambda items: second.wait(LONG_S) and list(items)
    model.on_land = lost
    engine.submit(batch([0]))
    if behind:
        engine.submit(batch([1, 2]))
    second.set()
    done = collect(engine)
    assert isinstance(done.fatal, DeviceError)
    assert done.outcomes == []


def test_waiting_for_inputs_is_not_the_devices_time(
    engine: Engine, model: Arrays, go_on: threading.Event
) -> None:
    """When the next batch is claimed depends on what the device takes: it waits longest when that is late."""
    slow = threading.Event()
    running(engine, model)
    model.on_prepare = lambda item: slow.wait(LONG_S) and item
    engine.submit(batch([1, 2]))
    go_on.set()
    collect(engine)
    threading.Timer(0.2, slow.set).start()
    done = collect(engine)
    assert 0 < done.waited_s <= done.seconds


class Runs:
    """An engine whose batch has run for ``running_s``."""

    def __init__(self, engine: Engine) -> None:
        self.current: Batch | None = batch([1])
        self.pipeline = engine.pipeline
        self.running_s = 0.0
        self.woken = threading.Event()
        self.wake = self.woken.set

    def prepares(self, _: str) -> bool:
        return False

    def limit(self, _: str) -> int:
        return 2


def test_the_next_batch_is_claimed_just_before_a_long_one_ends(engine: Engine) -> None:
    """So early that it can be staged; another worker may be idle before."""
    engine.pipeline.stager.usual = Known(0.005)
    runs: Any = Runs(engine)
    pace = Pace(runs, {"steps": 1.0})
    assert not pace.due()
    runs.running_s = 1.0 - 0.9 * (CLAIM_S + 2 * 0.005)
    assert pace.due()
    runs.running_s = 1.0 + 2 * AHEAD_MOST_S
    assert not pace.due()
    assert pace.late()


def test_a_worker_that_was_woken_too_early_is_woken_again(engine: Engine) -> None:
    """The batch began later than it was handed over: the device has waited for its inputs."""
    runs: Any = Runs(engine)
    pace = Pace(runs, {"steps": 4 * LONG_BATCH_S})
    for _ in range(2):
        runs.woken.clear()
        pace.watch()
        assert runs.woken.wait(LONG_S)
        assert not pace.due()
    runs.running_s = 4 * LONG_BATCH_S
    assert pace.due()
    pace.close()
