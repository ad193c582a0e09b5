# SPDX-License-Identifier: Apache-2.0
"""Prepare, device, finish: what runs beside what, what is held, and what fails where."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gpuinfer.errors import InferenceError, InputError, SoftTimeLimitExceeded, TaskRevoked
from gpuinfer.models.context import current
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.manifest import Manifest
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.message import Envelope
from gpuinfer.worker import failures, pipeline
from gpuinfer.worker.buffer import Batch, Part
from gpuinfer.worker.deadline import Deadline
from gpuinfer.worker.engine import Done, Engine
from gpuinfer.worker.sizes import GROWS_AFTER, TRIED_AFTER, Sizes
from gpuinfer.worker.task import Task

pytestmark = pytest.mark.unit
#: Seconds after which a test that waits has failed.
LONG_S = 60


class Steps(LoadedModel):
    """A model whose three steps a test watches, each item or output by itself; it keeps what went by."""

    prepares = finishes = runs_code = True

    def __init__(self) -> None:
        body = {"name": "steps", "artefact": "model.py"}
        super().__init__(Manifest.model_validate(body), "cpu")
        self.begun: list[Any] = []
        self.prepared: list[Any] = []
        self.passes: list[list[Any]] = []
        self.finished: list[Any] = []
        self.on_prepare: Callable[[Any], Any] = lambda item: item
        self.on_pass: Callable[[Sequence[Any]], Any] = list
        self.on_finish: Callable[[Any], Any] = lambda output: {"output": output}

    def prepare(self, values: Sequence[object]) -> list[Any]:
        (value,) = values
        self.begun.append(value)
        item = self.on_prepare(value)
        self.prepared.append(value)
        return [item]

    def forward(self, items: Sequence[Any]) -> list[Any]:
        self.passes.append(list(items))
        outputs: list[Any] = self.on_pass(items)
        return outputs

    def finish(self, outputs: Sequence[Any], **_: Any) -> list[Any]:
        (output,) = outputs
        result = self.on_finish(output)
        self.finished.append(output)
        return [result]

    def warm_up(self, max_batch_size: int | None = None) -> int:
        return 1


@pytest.fixture
def model() -> Steps:
    return Steps()


class Expired(list[list[Task]]):
    """For whom a hard limit has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.some = threading.Event()

    def append(self, tasks: list[Task]) -> None:
        super().append(tasks)
        self.some.set()


@pytest.fixture
def hard() -> Expired:
    return Expired()


@pytest.fixture
def engine(model: Steps, hard: Expired) -> Iterator[Engine]:
    # Untraced: while an interrupt is on its way to a thread in native code, CPython 3.11 stalls every other
    # thread that is traced, and the one that watches the clock must go on to the hard limit.
    tracing = threading.gettrace()
    threading.settrace(None)
    try:
        deadline = Deadline(lambda: hard.append(list(deadline.expired)))
    finally:
        threading.settrace(tracing)
    made = Engine({"steps": model}, Sizes({"steps": 64}), deadline, lambda: None, threads=2)
    yield made
    made.close()
    deadline.close()


def work(value: Any, number: int = 1, soft_s: float = 10, hard_s: float = 20) -> Task:
    envelope = Envelope({}, {}, {}, "gpuinfer.predict", f"task-{number}", 0, 0)
    claimed = Claimed(number, "realtime", 9, b"")
    return Task(claimed, envelope, "steps", [value], None, "list", soft_s, hard_s, None)


def batch(values: Sequence[Any], soft_s: float = 10, hard_s: float = 20) -> Batch:
    parts = tuple(Part(work(value, number, soft_s, hard_s), 0, 1) for number, value in enumerate(values))
    return Batch("steps", parts, soft_s, hard_s)


def collect(engine: Engine) -> Done:
    done = engine.done.get(timeout=LONG_S)
    engine.collected(done)
    return done


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_next_batch_is_ready_before_the_device_is_free(engine: Engine, model: Steps) -> None:
    """It is prepared while the device works, and the device goes on to it by itself."""
    go_on = threading.Event()
    model.on_pass = lambda items: go_on.wait(LONG_S) and list(items)
    engine.submit(batch([1]))
    assert engine.takes(batch([2, 3]))
    until(lambda: model.passes)
    engine.submit(batch([2, 3]))
    assert not engine.takes(batch([9]))
    until(lambda: len(model.prepared) == 3)
    assert model.passes == [[1]]
    go_on.set()
    assert [collect(engine).outcomes, collect(engine).outcomes] == [
        [{"output": 1}],
        [{"output": 2}, {"output": 3}],
    ]
    assert engine.current is None


def test_what_fails_in_prepare_never_reaches_the_device(engine: Engine, model: Steps) -> None:
    """Its neighbours are one pass; nothing is raised twice, and what was cancelled is not even prepared."""

    def prepare(item: int) -> Any:
        if item == 2:
            raise ZeroDivisionError("2")
        return InputError("three", "inputs") if item == 3 else item

    model.on_prepare = prepare
    submitted = batch([1, 2, 3, 4, 5])
    submitted.tasks[4].ended = True
    engine.submit(submitted)
    outcomes = collect(engine).outcomes
    assert [type(outcome) for outcome in outcomes] == [dict, InferenceError, InputError, dict, TaskRevoked]
    assert model.passes == [[1, 4]]
    assert 5 not in model.prepared


def test_what_is_prepared_is_bounded(engine: Engine, model: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more waits for the device than the memory for it; a batch that takes more runs in several passes."""
    monkeypatch.setattr(pipeline, "PREPARED_BYTES", 1000)
    monkeypatch.setattr(pipeline, "size_of", lambda _: 300)
    go_on = threading.Event()
    model.on_pass = lambda items: go_on.wait(LONG_S) and list(items)
    engine.submit(batch([0]))
    until(lambda: model.passes)
    engine.submit(batch(range(1, 21)))
    until(lambda: len(model.prepared) >= 5)
    time.sleep(0.05)
    assert len(model.prepared) <= 1 + 4 + 1  # both threads may have begun when there was room
    go_on.set()
    collect(engine)
    assert [outcome["output"] for outcome in collect(engine).outcomes] == list(range(1, 21))
    assert all(len(items) <= 5 for items in model.passes)


def test_a_batch_that_is_withdrawn_keeps_what_is_prepared(engine: Engine, model: Steps) -> None:
    """Nothing more of it is prepared; in its next batch, with others, only those are that were not."""
    go_on, slow = threading.Event(), threading.Event()
    model.on_pass = lambda items: go_on.wait(LONG_S) and list(items)
    model.on_prepare = lambda item: (slow.wait(LONG_S) if item > 2 else True) and item
    engine.submit(batch([0]))
    until(lambda: model.passes)
    first = batch([1, 2, 3, 4, 5])
    engine.submit(first)
    until(lambda: len(model.begun) == 5)
    assert engine.ahead is first
    assert engine.withdraw() is first
    assert engine.withdraw() is None
    slow.set()
    until(lambda: len(model.prepared) == 5)  # two had begun
    time.sleep(0.05)
    assert 5 not in model.prepared
    more = Batch("steps", (*first.parts, Part(work(6, 9), 0, 1)), 10, 20)
    engine.submit(more)
    go_on.set()
    collect(engine)
    assert [outcome["output"] for outcome in collect(engine).outcomes] == [1, 2, 3, 4, 5, 6]
    assert sorted(model.prepared) == [0, 1, 2, 3, 4, 5, 6]


def test_limits_hold_in_prepare_and_in_finish(engine: Engine, model: Steps, hard: Expired) -> None:
    """The soft one fails the input alone; the hard one names the task whose step it was."""

    def spin(item: int) -> int:
        while item == 2:
            pass
        return item

    model.on_prepare = spin
    engine.submit(batch([1, 2, 3], 3.0))
    outcomes = collect(engine).outcomes
    assert [type(outcome) for outcome in outcomes] == [dict, SoftTimeLimitExceeded, dict]
    model.on_prepare = lambda item: item
    model.on_finish = spin
    engine.submit(batch([1, 2, 3], 3.0))
    outcomes = collect(engine).outcomes
    assert [type(outcome) for outcome in outcomes] == [int, SoftTimeLimitExceeded, int]
    assert not hard
    model.on_finish = lambda output: (output != 2 or hard.some.wait(LONG_S)) and output
    engine.submit(batch([1, 2, 3], 3.0, 3.5))
    collect(engine)
    assert [[task.id for task in tasks] for tasks in hard] == [["task-1"]]


def test_the_device_goes_on_while_a_batch_is_finished(engine: Engine, model: Steps) -> None:
    """One batch at a time: the device waits for those who finish only when they are slower."""
    go_on = threading.Event()
    model.on_finish = lambda output: go_on.wait(LONG_S) and {"output": output}
    engine.submit(batch([0]))
    engine.submit(batch([1]))
    until(lambda: len(model.passes) == 2)
    engine.submit(batch([2]))
    assert not engine.takes(batch([9]))
    assert len(engine.batches) == 3
    go_on.set()
    assert [collect(engine).outcomes[0]["output"] for _ in range(3)] == [0, 1, 2]


def test_a_model_is_told_for_whom_it_works(engine: Engine, model: Steps) -> None:
    """Its tasks' ids, whether all of them were cancelled, and where to tell of progress."""
    seen: list[Any] = []

    def look(items: Sequence[Any]) -> list[Any]:
        work = current()
        assert work is not None
        work.progress(0.5)
        seen.append((work.model, list(work.task_ids), work.cancelled()))
        submitted.tasks[0].ended = True
        seen.append(work.cancelled())
        submitted.tasks[1].ended = True
        seen.append(work.cancelled())
        return list(items)

    model.on_pass = look
    submitted = batch([1, 2])
    engine.submit(submitted)
    collect(engine)
    assert seen == [("steps", ["task-0", "task-1"], False), False, True]
    assert [task.progress for task in submitted.tasks] == [0.5, 0.5]


def test_a_failure_is_logged_once_with_its_traceback(
    engine: Engine, model: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving raises it again and again; inputs that fail alike are one entry with all their tasks."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(
        failures.log, "warning", lambda action, **fields: lines.append({"action": action, **fields})
    )

    def refuse(items: Sequence[Any]) -> list[Any]:
        if min(items) < 0:
            cause = ValueError("negative")
            raise InferenceError("ValueError: negative (model.py, line 3)") from cause
        return list(items)

    model.on_pass = refuse
    engine.submit(batch([1, -1, 2, 3, -2, 4, 5, 6]))
    outcomes = collect(engine).outcomes
    assert [isinstance(outcome, Exception) for outcome in outcomes] == [
        *(False, True, False, False),
        *(True, False, False, False),
    ]
    (line,) = lines
    assert (line["action"], line["model"], line["task_ids"]) == (
        "model_failed",
        "steps",
        ["task-1", "task-4"],
    )
    assert line["exc_info"][0] is ValueError
    assert "line 3" in str(outcomes[1])
    assert outcomes[1].__cause__ is None, "no frames are held"


def test_a_caller_may_be_told_nothing(model: Steps) -> None:
    """models.errors = "none": the caller learns that the model failed, and that the journal says more."""
    error = InferenceError("ValueError: secret (model.py, line 3)")
    (answer,) = failures.told("steps", [work(1)], [error], "none")
    assert str(answer) == failures.UNTOLD


def test_a_size_that_did_not_fit_grows_back_slowly() -> None:
    """By a quarter after many full passes, after twice as many when it fails again; never past the most."""
    sizes = Sizes({"m": 64})
    sizes.shrink("m", 8)
    sizes.shrink("m", 16)  # it is smaller already
    for _ in range(10 * GROWS_AFTER):
        sizes.passed("m", 7)
    assert sizes.limit("m") == 8, "a pass that was not full tells nothing"
    for _ in range(GROWS_AFTER):
        sizes.passed("m", 8)
    assert sizes.limit("m") == 10
    sizes.shrink("m", 8)
    for _ in range(GROWS_AFTER):
        sizes.passed("m", 8)
    assert sizes.limit("m") == 8
    for _ in range(100 * GROWS_AFTER):
        sizes.passed("m", sizes.limit("m"))
    assert sizes.limit("m") == 64


def test_a_size_that_nobody_tried_is_doubled() -> None:
    """A model without an example begins with batches of one; a batch that does not fit ends the haste."""
    sizes = Sizes({"m": 1}, {"m": 100})
    seen = []
    for _ in range(4):
        seen.append(sizes.limit("m"))
        for _ in range(TRIED_AFTER):
            sizes.passed("m", sizes.limit("m"))
    assert seen == [1, 2, 4, 8]
    sizes.shrink("m", 8)
    for _ in range(TRIED_AFTER):
        sizes.passed("m", 8)
    assert sizes.limit("m") == 8


def test_an_urgent_batch_is_prepared_when_memory_is_full(
    engine: Engine, model: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is first in what it was joined to: no thread waits for the room that only it can make."""
    monkeypatch.setattr(pipeline, "PREPARED_BYTES", 1000)
    monkeypatch.setattr(pipeline, "size_of", lambda _: 600)
    go_on = threading.Event()
    model.on_pass = lambda items: go_on.wait(LONG_S) and list(items)
    engine.submit(batch([0]))
    until(lambda: model.passes)
    first = batch(range(1, 21))
    engine.submit(first)
    until(lambda: len(model.prepared) >= 3)
    for number in range(100, 150):
        assert engine.withdraw() is not None
        urgent = Batch("steps", (Part(work(number, number), 0, 1), *first.parts), 10, 20)
        engine.submit(urgent)
    go_on.set()
    collect(engine)
    assert [outcome["output"] for outcome in collect(engine).outcomes] == [149, *range(1, 21)]


def test_what_withdrawn_batches_keep_is_bounded(
    engine: Engine, model: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was overtaken again and again no more is kept than one batch may have; the rest is repeated."""
    monkeypatch.setattr(pipeline, "PREPARED_BYTES", 1000)
    monkeypatch.setattr(pipeline, "size_of", lambda _: 400)
    go_on = threading.Event()
    model.on_pass = lambda items: go_on.wait(LONG_S) and list(items)
    engine.submit(batch([0]))
    until(lambda: model.passes)
    overtaken = [batch([number, number + 1]) for number in range(1, 21, 2)]
    for one in overtaken:
        count = len(model.prepared)
        engine.submit(one)
        until(lambda count=count: len(model.prepared) == count + 2)  # type: ignore[misc]
        until(lambda one=one: all(task.prepared[0].stage == "ready" for task in one.tasks))  # type: ignore[misc]
        engine.withdraw()
    slots = [slot for one in overtaken for task in one.tasks for slot in (task.prepared or {}).values()]
    assert sum(slot.item is not None for slot in slots) == 2
    engine.submit(overtaken[0])
    go_on.set()
    collect(engine)
    assert [outcome["output"] for outcome in collect(engine).outcomes] == [1, 2]


def test_what_a_withdrawn_batch_still_prepares_is_chargeable(engine: Engine, model: Steps) -> None:
    """A thread that is in there cannot be called back, and may end the process yet."""
    go_on, slow = threading.Event(), threading.Event()
    model.on_pass = lambda items: go_on.wait(LONG_S) and list(items)
    model.on_prepare = lambda item: (slow.wait(LONG_S) if item else True) and item
    engine.submit(batch([0]))
    until(lambda: model.passes)
    ahead = batch([1])
    engine.submit(ahead)
    until(lambda: ahead.tasks[0].prepared[0].stage == "begun")  # type: ignore[index]
    engine.withdraw()
    assert engine.chargeable == [*engine.batches, ahead]
    go_on.set()
    collect(engine)
    assert engine.chargeable == [ahead]
    slow.set()
    until(lambda: not engine.chargeable)


def test_a_batch_that_has_ended_is_let_go(engine: Engine, model: Steps) -> None:
    """Its inputs may be large: they do not wait for Python to look for circles."""
    gc.collect()
    gc.disable()
    try:
        submitted = batch([1, 2])
        tasks = [weakref.ref(task) for task in submitted.tasks]
        engine.submit(submitted)
        collect(engine)
        del submitted
        until(lambda: not any(task() for task in tasks))
    finally:
        gc.enable()


def test_a_neighbours_limit_is_not_held_against_an_input(engine: Engine, model: Steps) -> None:
    """The batch has the smallest of its tasks' limits; a step of one input has its own task's."""
    model.on_prepare = lambda item: threading.Event().wait(1.2 if item == 2 else 0) or item
    parts = tuple(Part(work(value, value), 0, 1) for value in (1, 2))
    engine.submit(Batch("steps", parts, 1.0, 20))
    assert [type(outcome) for outcome in collect(engine).outcomes] == [dict, dict]


@pytest.mark.parametrize("step", ["on_prepare", "on_pass", "on_finish"])
def test_a_model_may_raise_whatever_it_likes(engine: Engine, model: Steps, step: str) -> None:
    """Also what does not say what it is, and what is no Exception: the input fails, the threads go on."""

    class Unsayable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    class Odd(BaseException):
        pass

    works = getattr(model, step)
    for error in (Unsayable, Odd):

        def fail(_: object, error: type[BaseException] = error) -> None:
            raise error

        setattr(model, step, fail)
        engine.submit(batch([1]))
        (outcome,) = collect(engine).outcomes
        assert isinstance(outcome, InferenceError)
        assert error.__name__ in str(outcome)
    setattr(model, step, works)
    engine.submit(batch([1]))
    assert collect(engine).outcomes == [{"output": 1}]
    assert engine.failed is None


def test_a_thread_that_fails_ends_the_worker(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a mistake of ours: its batch would never end, and so the process does, with its tasks put back."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(engine, "_end", broken)
    engine.submit(batch([1]))
    assert engine.next_done() is None
    assert "ZeroDivisionError" in str(engine.failed)


def test_each_end_is_told(engine: Engine) -> None:
    """Of two batches that end while somebody waits for the first, the second is told."""
    woken: list[bool] = []
    engine.wake = lambda: woken.append(True)
    ends = [Done(batch([number]), [], 0.0) for number in range(2)]
    for end in ends:
        engine.done.put(end)
    assert engine.wait(LONG_S) is ends[0]
    assert woken == [True]
    assert engine.wait(LONG_S) is ends[1]
    assert woken == [True]


def test_the_size_of_what_is_prepared_is_seen_in_whatever_holds_it() -> None:
    """Arrays in dictionaries, data classes and lists count; what is there twice counts once."""

    @dataclass
    class Holder:
        value: Any
        files: tuple[str, ...] = ()

    array = np.zeros(1_000_000, np.uint8)
    for value in (array, [array, array], {"a": array}, UserDict(a=array), Holder(array), [Holder([array])]):
        assert 1_000_000 <= pipeline.size_of(value) < 1_010_000
