# SPDX-License-Identifier: Apache-2.0
"""A caller's quota as the script takes it, and what is told of refusals."""

from __future__ import annotations

import pytest

from gpuinfer.errors import GpuinferError, KeyQuota, RateLimited
from gpuinfer.queue.quota import Quota, Refusals, weighing

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("quota", "text"),
    [
        (Quota(), ""),
        (Quota(rate=50), "50.000000 13 0 0"),
        (Quota(rate=0.5), "0.500000 1 0 0"),
        (Quota(rate=50, burst=100, max_waiting=7, max_waiting_bytes=9), "50.000000 100 7 9"),
        (Quota(burst=5), ""),
        (Quota(max_waiting=3), "0.000000 0 3 0"),
    ],
)
def test_as_the_script_takes_it(quota: Quota, text: str) -> None:
    """No bound, no text: the script does nothing for it then."""
    assert quota.text == text


def test_a_line_when_refusals_begin(caplog: pytest.LogCaptureFixture) -> None:
    """One for each caller and kind, and another after a quiet minute."""
    clock = iter([0.0, 1.0, 2.0, 63.0, 64.0]).__next__
    refusals = Refusals(clock)
    limited = RateLimited("slow down")
    for caller, error in (
        ("alice", limited),
        ("alice", limited),
        ("bob", KeyQuota("full")),
        ("alice", GpuinferError("no")),
        ("alice", limited),
        ("alice", limited),
    ):
        refusals.note(caller, error)
    said = [record.fields["caller"] for record in caplog.records if record.action == "quota_refused"]  # type: ignore[attr-defined]
    assert said == ["alice", "bob", "alice"]
    assert refusals.counts == {("alice", "rate_limited"): 4, ("bob", "key_quota"): 1}


def test_weights() -> None:
    """Those that are not 1 are kept; who has gone, or weighs 1 now, goes."""
    commands = weighing({"alice": 3, "bob": 1, "carol": 0.5, "dave": 0}, [b"bob", b"carol", b"eve"])
    assert commands == [
        ["HDEL", "gpuinfer:weights", "bob", "eve"],
        ["HSET", "gpuinfer:weights", "alice", "3", "carol", "0.5"],
    ]
    assert weighing({}, []) == []
