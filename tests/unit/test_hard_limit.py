# SPDX-License-Identifier: Apache-2.0
"""The end of a process whose batch has passed its hard limit."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest

from gpuinfer.queue.store import Store
from gpuinfer.worker import bootstrap
from gpuinfer.worker.ceiling import EX_HARD_LIMIT

pytestmark = pytest.mark.unit


class Noted:
    """A store that has what was done written down."""

    worker = "gpu0@here"

    def __init__(self) -> None:
        self.done: list[Any] = []

    def note(self, seqs: list[int]) -> None:
        self.done.append("noted")


def test_nothing_is_waited_for_between_the_record_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the journal is slow the main thread may begin another batch, which must not be charged."""
    store = Noted()

    def end(code: int) -> None:
        store.done.append(code)
        raise SystemExit

    monkeypatch.setattr(bootstrap, "flush", lambda: store.done.append("read by the journal"))
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        bootstrap._end_at_hard_limit([], cast("Store", store))
    assert store.done == ["read by the journal", "noted", EX_HARD_LIMIT]
