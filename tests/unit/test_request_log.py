# SPDX-License-Identifier: Apache-2.0
"""The front's request log: trouble as an episode, success in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from gpuinfer.api.request_log import NAMED_MISTAKES, NAMED_REASONS, RequestLog

pytestmark = pytest.mark.unit

FULL: dict[str, Any] = {"path": "/predict", "code": "broker_error", "reason": "no disk"}


class Front:
    """A request log with a clock of its own."""

    def __init__(self, said: Literal["trouble", "all"] = "trouble") -> None:
        self.now = 1000.0
        self.log = RequestLog(said, lambda: self.now)

    def answer(self, status: int, count: int = 1, over_s: float = 0.0, **fields: Any) -> None:
        """Note requests that were answered so, evenly over some seconds, each second ticked."""
        for _ in range(count):
            self.now += over_s / count
            self.log.add("request", status, 0.002, {"status": status, **fields})
            self.log.tick()


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as found:
        yield found


def events(lines: list[Any]) -> list[str]:
    return [line["event"] for line in lines]


def test_a_full_disk_is_an_episode(lines: list[Any]) -> None:
    """749 refused requests are a warning when it begins, one a minute, and one when it has ended."""
    front = Front()
    front.answer(503, 749, over_s=150, **FULL)
    front.answer(202, 30, over_s=30)
    told = [line for line in lines if line["log_level"] == "warning"]
    assert events(told) == [
        "requests_refused",
        "requests_still_refused",
        "requests_still_refused",
        "requests_refused_no_more",
    ]
    assert (told[0]["reason"], told[0]["code"]) == ("no disk", "broker_error")
    assert told[1]["reason"] == "no disk"
    assert told[-1]["count"] == 749
    assert told[-1]["lasted_s"] == pytest.approx(150, abs=1)


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (403, "forbidden")])
def test_who_is_not_let_in_is_an_episode(lines: list[Any], status: int, code: str) -> None:
    """One line when refusals begin, and their number at the end: nobody fills the journal by guessing."""
    front = Front()
    front.answer(status, 10_000, over_s=20, code=code, reason="this key is unknown", client="192.0.2.7")
    front.answer(202, 30, over_s=30)
    assert events([line for line in lines if line["log_level"] == "warning"]) == [
        "requests_refused",
        "requests_refused_no_more",
    ]
    assert (lines[0]["code"], lines[0]["client"], lines[-1]["count"]) == (code, "192.0.2.7", 10_000)


def test_two_reasons_are_two_episodes(lines: list[Any]) -> None:
    """Each code begins and ends by itself; a process that stops says what has not been said."""
    front = Front()
    front.answer(503, 5, **FULL)
    front.answer(429, 5, code="queue_full", reason="max_waiting")
    front.log.close()
    assert events(lines) == ["requests_refused"] * 2 + ["requests_refused_no_more"] * 2
    assert [line["code"] for line in lines] == ["broker_error", "queue_full"] * 2


def test_a_further_reason_under_one_code_is_told_at_once(lines: list[Any]) -> None:
    """Once each, whatever its numbers are, up to a number of reasons."""
    front = Front()
    full = "the disk is full (7 MiB free)"
    for reason in ("no answer", full, "no answer", full.replace("7", "8")):
        front.answer(503, 10, over_s=4, code="broker_unavailable", reason=reason)
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("requests_refused", "no answer"),
        ("requests_still_refused", full),
    ]
    assert lines[1]["count"] == 10
    for number in range(100):
        front.answer(503, code="broker_unavailable", reason=f"reason {chr(65 + number)}")
    assert len(lines) == NAMED_REASONS


def test_success_is_counted(lines: list[Any]) -> None:
    """What succeeds has a line a minute, whatever the rate; a quiet front has none."""
    front = Front()
    front.answer(202, 6_000, over_s=61)
    front.answer(200, 10)
    for _ in range(200):
        front.now += 1
        front.log.tick()
    assert events(lines) == ["requests", "requests"]
    assert sum(line["succeeded"] for line in lines) == 6_010
    assert sum(line["accepted"] for line in lines) == 6_000
    assert {line["log_level"] for line in lines} == {"info"}
    assert lines[0]["longest_ms"] == 2.0


def test_a_client_s_mistake_is_no_warning(lines: list[Any]) -> None:
    """Mistakes are named at info, some a minute; the rest is in the counts."""
    front = Front()
    front.answer(422, 500, over_s=59, code="bad_input")
    front.answer(422, 500, over_s=59, code="bad_input")
    front.log.close()
    assert {line["log_level"] for line in lines} == {"info"}
    assert events(lines).count("request") == 2 * NAMED_MISTAKES
    assert sum(line["mistakes"] for line in lines if line["event"] == "requests") == 1000


def test_all_of_them(lines: list[Any]) -> None:
    """With log.requests = "all" each that succeeds has its line."""
    front = Front("all")
    front.answer(202, 3, task_id="a")
    assert events(lines) == ["request"] * 3
    assert lines[0]["task_id"] == "a"


def test_success_is_counted_without_a_line(lines: list[Any]) -> None:
    """Unless each request has its own."""
    front = Front()
    assert all(front.log.count(status, 0.25) for status in (200, 202, 202))
    front.log.close()
    assert [(line["succeeded"], line["accepted"], line["longest_ms"]) for line in lines] == [(3, 2, 250.0)]
    assert not Front("all").log.count(200, 0.25)
