# SPDX-License-Identifier: Apache-2.0
"""A worker's lines about its tasks: all are named at a low rate, those with trouble at any rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import structlog

from gpuinfer.errors import DeviceOutOfMemory, InferenceError, InputError, SoftTimeLimitExceeded
from gpuinfer.queue.claims import Claimed
from gpuinfer.settings import LogSettings
from gpuinfer.worker.buffer import Batch, Part
from gpuinfer.worker.engine import Done
from gpuinfer.worker.passes import RunAlone
from gpuinfer.worker.task import Task
from gpuinfer.worker.task_log import RATE_S, TaskLog
from tests.unit.test_engine import work

pytestmark = pytest.mark.unit


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as found:
        yield found


class Worker:
    """Runs batches in no time, on a clock of its own."""

    def __init__(self, named_tasks: float = 50.0) -> None:
        self.now = 1000.0
        self.log = TaskLog(LogSettings(named_tasks=named_tasks), lambda: self.now)
        self._number = 0

    def tasks(self, count: int) -> list[Task]:
        self._number += count
        return [
            replace(work([1.0], number), claimed=Claimed(number, "realtime", 5, b"{}"))
            for number in range(self._number - count, self._number)
        ]

    def run(self, tasks: Sequence[Task], outcome: object = 1, seconds: float = 0.01) -> list[str]:
        batch = Batch(tasks[0].model, tuple(Part(task, 0, 1) for task in tasks), 3.0, 4.0)
        self.log.batch_done(Done(batch, [outcome] * len(tasks), seconds), "cpu")
        return [task.id for task in tasks]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.log.tick("cpu")


def named(lines: list[Any]) -> set[str]:
    found = {one for line in lines for one in line.get("task_ids", ())}
    return found | {line["task_id"] for line in lines if "task_id" in line}


def test_all_are_named_at_a_low_rate(lines: list[Any]) -> None:
    """Forty a second for a minute: each batch has its line, each task its name."""
    worker, ids = Worker(), []
    for _ in range(600):
        worker.pass_time(0.1)
        ids += worker.run(worker.tasks(4))
    assert named(lines) == set(ids)
    assert {line["event"] for line in lines} == {"batch_done"}


def test_above_there_is_one_summary_a_second(lines: list[Any]) -> None:
    """A full rate for a minute: a summary a second and model, and in sum every task and batch."""
    worker = Worker()
    tasks = worker.tasks(256)
    for _ in range(600):
        worker.pass_time(0.1)
        worker.run(tasks)
    worker.log.tick("cpu", last=True)
    summaries = [line for line in lines if line["event"] == "batches_done"]
    single = [line for line in lines if line["event"] == "batch_done"]
    assert 55 <= len(summaries) <= 61
    assert len(single) <= 50 * RATE_S / 256 + 1
    assert sum(line["tasks"] for line in lines) == 600 * 256
    assert sum(line["batches"] for line in summaries) + len(single) == 600
    assert {"model", "queues", "failed", "duration_ms", "longest_ms", "device"} <= set(summaries[0])


def test_named_again_soon_after_a_burst(lines: list[Any]) -> None:
    """Ten seconds after the highest rate a single task has its line."""
    worker = Worker()
    tasks = worker.tasks(256)
    for _ in range(100):
        worker.pass_time(0.1)
        worker.run(tasks)
    worker.pass_time(10)
    (task_id,) = worker.run(worker.tasks(1))
    assert lines[-1]["task_ids"] == [task_id]


def test_one_that_came_again_is_named_at_any_rate(lines: list[Any]) -> None:
    """As is one that was retried, and all of a slow batch."""
    worker = Worker(named_tasks=0)
    tasks = worker.tasks(50)
    tasks[7].envelope.deliveries = 1
    tasks[9].retries = 1
    worker.run(tasks)
    assert named(lines) == {tasks[7].id, tasks[9].id}
    assert lines[0]["tasks"] == 50
    slow = worker.run(worker.tasks(20), seconds=10.0)
    assert set(slow) <= named(lines)
    long = worker.tasks(1)
    long[0].ran_s = 11.0
    worker.run(long)
    assert long[0].id in named(lines)


@pytest.mark.parametrize("count", [1, 3, 4, 500])
def test_one_that_failed_is_named_at_any_rate(lines: list[Any], count: int) -> None:
    """Few have a line each, with its own reason; many of one batch share a line, which names them all."""
    worker = Worker(named_tasks=0)
    tasks = worker.tasks(count)
    for number, task in enumerate(tasks):
        worker.log.task_failed(task, InferenceError(f"reason {number}"))
    assert lines == [], "they are told together"
    worker.run(tasks, InferenceError("x"))
    failed = [line for line in lines if line["event"] == "task_failed"]
    assert named(failed) == {task.id for task in tasks}
    assert len(failed) == (count if count <= 3 else 1)
    assert {line["log_level"] for line in failed} == {"warning"}
    assert {(line["code"], line["model"]) for line in failed} == {("inference_failed", tasks[0].model)}
    assert failed[0]["reason"].startswith("reason 0")
    if count > 3:
        assert f"{count - 1} other reasons" in failed[0]["reason"]


def test_retries_and_refusals_too(lines: list[Any]) -> None:
    """A client's mistake is told at info, what this host could not do as a warning."""
    worker = Worker(named_tasks=0)
    tasks = worker.tasks(20)
    for task in tasks[:10]:
        worker.log.task_retried(task, 0.5, DeviceOutOfMemory("full"))
        task.retries = 0
    for task in tasks[10:]:
        worker.log.task_refused(task.claimed, task.id, InputError("must be 8 x 8", "inputs"))
    worker.log.tell()
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("task_retried", "warning"),
        ("task_refused", "info"),
    ]
    assert named(lines) == {task.id for task in tasks}


def test_a_time_out_names_model_tasks_and_limit(lines: list[Any]) -> None:
    """Of a batch that was too slow as a whole, and of a single task."""
    worker = Worker(named_tasks=0)
    tasks = worker.tasks(5)
    worker.run(tasks, RunAlone())
    line = next(line for line in lines if line["event"] == "batch_too_slow")
    assert (line["model"], line["limit_s"]) == (tasks[0].model, 3.0)
    assert set(line["task_ids"]) == {task.id for task in tasks}
    assert "soft time limit of 3 s" in line["reason"]
    worker.log.task_failed(tasks[0], SoftTimeLimitExceeded("ran longer than its soft limit of 3 s"))
    worker.log.tell()
    line = lines[-1]
    assert (line["task_id"], line["model"], line["log_level"]) == (tasks[0].id, tasks[0].model, "warning")
    assert "3 s" in line["reason"]
