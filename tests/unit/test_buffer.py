# SPDX-License-Identifier: Apache-2.0
"""Which batch is next: urgency, fellows, slices, those that must run alone, those that wait for a retry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuinfer.queue.store import Claimed
from gpuinfer.worker.buffer import Buffer
from gpuinfer.worker.work import Work
from tests.unit.test_engine import work

pytestmark = pytest.mark.unit


def task(number: int, rank: int = 5, inputs: int = 1, **changes: Any) -> Work:
    made = replace(work([1.0], number), claimed=Claimed(number, "x", rank, b"{}"), inputs=[[1.0]] * inputs)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def filled(*works: Work, limit: int = 4) -> Buffer:
    buffer = Buffer(lambda _: limit)
    for one in works:
        buffer.add(one)
    return buffer


def seqs(buffer: Buffer, now: float = 0.0) -> list[int]:
    batch = buffer.next_batch(now)
    return [] if batch is None else [one.seq for one in batch.works]


def test_urgent_first_then_as_they_came() -> None:
    """The batch takes the best ranks, and within a rank the order of arrival."""
    buffer = filled(task(1, 9), task(2, 3), task(3, 9), task(4, 3), task(5, 0), task(6, 9))
    assert seqs(buffer) == [5, 2, 4, 1]


def test_fellows_share_model_and_limits() -> None:
    """Another model, or other limits, wait for a batch of their own."""
    buffer = filled(task(1), task(2, model="other"), task(3, hard_limit_s=5.0), task(4))
    assert seqs(buffer) == [1, 4]


def test_alone() -> None:
    """Who must run alone has no fellows, and is nobody's."""
    buffer = filled(task(1), task(2, alone=True), task(3))
    assert seqs(buffer) == [1, 3]
    buffer.remove([one for one in buffer if not one.alone])
    assert seqs(buffer) == [2]


def test_slices() -> None:
    """A job of many inputs fills what is left of the batch, and goes on where it stopped."""
    buffer = filled(task(1), task(2, inputs=10))
    batch = buffer.next_batch(0)
    assert batch is not None
    assert [(part.start, part.stop) for part in batch.parts] == [(0, 1), (0, 3)]
    assert batch.size == 4
    batch.works[1].outcomes += [{}] * 3
    buffer.remove(batch.works[:1])
    again = buffer.next_batch(0)
    assert again is not None
    assert [(part.start, part.stop) for part in again.parts] == [(3, 7)]


def test_a_retry_waits_for_its_time() -> None:
    """A task that waits for its retry is passed over until then."""
    buffer = filled(task(1, not_before=5.0), task(2))
    assert seqs(buffer, now=1.0) == [2]
    assert seqs(buffer, now=5.0) == [1, 2]
    assert seqs(filled(task(1, not_before=5.0)), now=1.0) == []


@given(
    st.lists(st.tuples(st.integers(0, 29), st.integers(1, 9)), min_size=1, max_size=40), st.integers(1, 16)
)
def test_every_input_runs_once(jobs: list[tuple[int, int]], limit: int) -> None:
    """Whatever waits, batches stay within the limit and every input of every task is run exactly once."""
    buffer = filled(*(task(i + 1, rank, count) for i, (rank, count) in enumerate(jobs)), limit=limit)
    ran = 0
    while (batch := buffer.next_batch(0)) is not None:
        assert 1 <= batch.size <= limit
        ran += batch.size
        buffer.remove(batch.works)
        for part in batch.parts:
            part.work.outcomes += [{}] * (part.stop - part.start)
            if part.work.left:
                buffer.add(part.work)
    assert ran == sum(count for _, count in jobs)
    assert len(buffer) == 0
