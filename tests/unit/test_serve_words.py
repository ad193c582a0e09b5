# SPDX-License-Identifier: Apache-2.0
"""What ``gpuinfer serve`` prints of its processes' logs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from gpuinfer.serve.words import Words

pytestmark = pytest.mark.unit

WHY = "ocr.predict: ValueError: oh no (model.py, line 4)"
TRACE = "Traceback (most recent call last):\nValueError: oh no"


def printed(*entries: dict[str, Any]) -> list[str]:
    """Return the lines that entries of a worker's log become."""
    out = io.StringIO()
    words = Words(Console(file=out, width=200), lambda text: text)
    for entry in entries:
        words("worker", {"level": "error", **entry})
    return out.getvalue().splitlines()


def test_a_failure_is_told_once() -> None:
    """Its trace and its reason: the worker's and the tasks' entries say the same again."""
    failed = {"action": "model_failed", "reason": WHY, "exception": TRACE}
    again = [
        {"action": "start_failed", "reason": f"ocr: {WHY}"},
        *({"action": "task_failed", "reason": WHY} for _ in range(3)),
    ]
    assert printed(failed, *again) == [*TRACE.splitlines(), f"model_failed: {WHY}"]


def test_what_says_something_else_is_told() -> None:
    """A task's own fault, and a start that failed for no model's."""
    failed = {"action": "model_failed", "reason": WHY}
    other = {"action": "task_failed", "reason": "inputs: must be a string, got a number"}
    assert printed(failed, other)[1:] == ["task_failed: inputs: must be a string, got a number"]
    assert printed({"action": "start_failed", "reason": "no such queue", "hint": "name one"}) == [
        "no such queue; name one"
    ]
