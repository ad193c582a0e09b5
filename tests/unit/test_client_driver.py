# SPDX-License-Identifier: Apache-2.0
"""What both clients remember of the fleet."""

from __future__ import annotations

import pytest

from gpuinfer.client.driver import DefaultModel

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
