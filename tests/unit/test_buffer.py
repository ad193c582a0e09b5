# SPDX-License-Identifier: Apache-2.0
"""Which batch is next: urgency, fellows, slices, those that must run alone, those that wait for a retry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuinfer.queue.claims import Claimed
from gpuinfer.worker.buffer import Buffer
from gpuinfer.worker.task import Task
from tests.unit.test_engine import work

pytestmark = pytest.mark.unit


def task(number: int, rank: int = 5, inputs: int = 1, **changes: Any) -> Task:
    made = replace(work([1.0], number), claimed=Claimed(number, "x", rank, b"{}"), inputs=[[1.0]] * inputs)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def filled(*tasks: Task, limit: int = 4) -> Buffer:
    buffer = Buffer(lambda _: limit)
    for one in tasks:
        buffer.add(one)
    return buffer


def seqs(buffer: Buffer, now: float = 0.0) -> list[int]:
    buffer.wake(now)
    batch = buffer.next_batch()
    return [] if batch is None else [one.seq for one in batch.tasks]


def test_urgent_first_then_as_they_came() -> None:
    """The batch takes the best ranks, and within a rank the order of arrival."""
    buffer = filled(task(1, 9), task(2, 3), task(3, 9), task(4, 3), task(5, 0), task(6, 9))
    assert seqs(buffer) == [5, 2, 4, 1]


def test_fellows_share_model_and_limits() -> None:
    """Another model, or quite other limits, wait for a batch of their own."""
    buffer = filled(task(1), task(2, model="other"), task(3, hard_limit_s=5.0), task(4))
    assert seqs(buffer) == [1, 4]


def test_limits_between_two_powers_of_two_share_a_pass() -> None:
    """It takes the smallest, so that nobody gets more than it asked for, and at least half of it."""
    limits = [8.0, 15.9, 16.0, 7.9, 9.5]
    buffer = filled(*(task(n, soft_limit_s=limit, hard_limit_s=20.0 + n) for n, limit in enumerate(limits)))
    batch = buffer.next_batch()
    assert batch is not None
    assert [one.seq for one in batch.tasks] == [0, 1, 4]
    assert (batch.soft_limit_s, batch.hard_limit_s) == (8.0, 20.0)
    buffer.remove(batch.tasks)
    assert seqs(buffer) == [2]


def test_what_is_left_of_a_jobs_time_is_its_limit() -> None:
    """A job at the end of its time shares a pass with nobody who has more."""
    old = task(1, inputs=9, soft_total_s=10.0)
    old.ran_s = 9.0
    assert seqs(filled(old, task(2))) == [1]


def test_alone() -> None:
    """Who must run alone has no fellows, and is nobody's."""
    buffer = filled(task(1), task(2, alone=True), task(3))
    assert seqs(buffer) == [1, 3]
    buffer.remove([one for one in buffer if not one.alone])
    assert seqs(buffer) == [2]


def test_slices() -> None:
    """A job of many inputs fills what is left of the batch, and goes on where it stopped."""
    buffer = filled(task(1), task(2, inputs=10))
    batch = buffer.next_batch()
    assert batch is not None
    assert [(part.start, part.stop) for part in batch.parts] == [(0, 1), (0, 3)]
    assert batch.size == 4
    batch.tasks[1].outcomes += [{}] * 3
    buffer.remove(batch.tasks[:1])
    again = buffer.next_batch()
    assert again is not None
    assert [(part.start, part.stop) for part in again.parts] == [(3, 7)]


def test_a_retry_waits_for_its_time() -> None:
    """A task that waits for its retry is passed over until then."""
    buffer = filled(task(1, not_before=5.0), task(2))
    assert seqs(buffer, now=1.0) == [2]
    assert seqs(buffer, now=5.0) == [1, 2]
    assert seqs(filled(task(1, not_before=5.0)), now=1.0) == []


def test_what_fills_a_models_batch() -> None:
    """Its inputs are counted, not its tasks, nor what waits for its time; one that runs alone fills it."""
    buffer = filled(limit=4)
    assert buffer.spare("picky") == 4
    buffer.add_all([task(1), task(2, model="other", inputs=2), task(3, not_before=9.0, inputs=9)])
    assert (buffer.spare("picky"), buffer.spare("other")) == (3, 2)
    buffer.add(task(4, inputs=7))
    assert buffer.spare("picky") <= 0
    assert filled(task(1, alone=True)).spare("picky") <= 0


def test_surplus() -> None:
    """Two full batches of a model stay; what comes after them goes back, except what has begun."""
    buffer = filled(task(1, inputs=7), task(2), task(3, model="other"), task(4), task(5), limit=4)
    assert [held.seq for held in buffer.surplus(10**9)] == [4, 5]
    begun = filled(task(1, inputs=9), task(2, time_start=1.0), task(3), limit=4)
    assert [held.seq for held in begun.surplus(10**9)] == [3]


def test_surplus_of_bytes() -> None:
    """Arguments beyond the bytes go back, but never the first: it must run somewhere."""
    buffer = filled(*(task(number) for number in range(1, 6)))
    for one in buffer:
        one.envelope.size = 2
    assert buffer.size == 10
    assert [held.seq for held in buffer.surplus(4)] == [3, 4, 5]
    assert [held.seq for held in buffer.surplus(0)] == [2, 3, 4, 5]


def test_aged_once() -> None:
    """What has aged goes first until a batch has begun; then it goes on where its list stands."""
    old = [task(number, 9, inputs=8) for number in (1, 2)]
    for one in old:
        one.claimed = replace(one.claimed, aged=True)
    buffer = filled(task(3, 0), *old)
    batch = buffer.next_batch()
    assert batch is not None
    assert [held.seq for held in batch.tasks] == [1]
    buffer.remove(batch.tasks)
    buffer.end_ageing(batch.tasks)
    batch.tasks[0].outcomes += [{}] * 4
    buffer.add(batch.tasks[0])
    assert seqs(buffer) == [3, 1]


def test_slices_get_smaller() -> None:
    """A job whose slice was too slow takes no larger one than it is told."""
    buffer = filled(task(1, inputs=10, alone=True, slice_limit=2), task(2))
    batch = buffer.next_batch()
    assert batch is not None
    assert [(part.task.seq, part.start, part.stop) for part in batch.parts] == [(1, 0, 2)]


def test_what_is_left_of_a_requests_time() -> None:
    """A batch ends softly when the request's time for the whole job is over, whichever limit it gave."""
    for limited in (task(1, soft_total_s=1.0), task(1, hard_total_s=1.0)):
        limited.ran_s = 0.75
        batch = filled(limited).next_batch()
        assert batch is not None
        assert batch.soft_limit_s == 0.25
        assert batch.hard_limit_s > 1


@given(
    st.lists(st.tuples(st.integers(0, 29), st.integers(1, 9)), min_size=1, max_size=40), st.integers(1, 16)
)
def test_every_input_runs_once(jobs: list[tuple[int, int]], limit: int) -> None:
    """Whatever waits, batches stay within the limit and every input of every task is run exactly once."""
    buffer = filled(*(task(i + 1, rank, count) for i, (rank, count) in enumerate(jobs)), limit=limit)
    ran = 0
    while (batch := buffer.next_batch()) is not None:
        assert 1 <= batch.size <= limit
        ran += batch.size
        buffer.remove(batch.tasks)
        for part in batch.parts:
            part.task.outcomes += [{}] * (part.stop - part.start)
            if part.task.left:
                buffer.add(part.task)
    assert ran == sum(count for _, count in jobs)
    assert len(buffer) == 0
