# SPDX-License-Identifier: Apache-2.0
"""What both clients remember of the fleet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuinfer.client import calls, submissions
from gpuinfer.client.driver import DefaultModel
from gpuinfer.errors import PayloadTooLarge
from gpuinfer.queue.submission import Json
from gpuinfer.settings import QueueSettings

pytestmark = pytest.mark.unit


def test_the_default_model_is_asked_for_now_and_then() -> None:
    """That there is none yet holds for a moment alone: many submissions in a row make one trip each."""
    now = 1000.0
    remembered = DefaultModel(lambda: now)
    assert remembered.stale
    remembered.found(None)
    assert (remembered.name, remembered.stale) == (None, False)
    now += DefaultModel.NONE_S + 0.01
    assert remembered.stale
    remembered.found(b"digits")
    now += DefaultModel.FRESH_S - 0.1
    assert (remembered.name, remembered.stale) == ("digits", False)
    now += 0.2
    assert remembered.stale


@pytest.mark.parametrize("inputs", [[1, 2, 3], (1, 2, 3), np.zeros((3, 2)), Json(b"[1,2,3]", [1, 2, 3])])
def test_a_job_is_bounded_in_items(inputs: Any) -> None:
    """In whatever form its inputs come; one input may be as long as it likes."""
    settings = QueueSettings(max_items=2)
    with pytest.raises(PayloadTooLarge, match=r"the job has 3 items; queue\.max_items is 2") as caught:
        calls.one(submissions.build(inputs, many=True), settings)
    assert caught.value.field == "inputs"
    calls.one(submissions.build(inputs, many=True), QueueSettings(max_items=3))
    calls.one(submissions.build(inputs, many=False), settings)
