# SPDX-License-Identifier: Apache-2.0
"""The accounts as they are asked for and shown, and what the front counts of a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpuinfer.api.accounting import CALLER, MODEL, RECEIVED, Accounts
from gpuinfer.errors import InputError
from gpuinfer.queue import usage

pytestmark = pytest.mark.unit


def test_a_span_is_checked() -> None:
    """The error says what would be right."""
    assert [usage.since_of(text) for text in ("90m", "24h", "7d", "5w")] == [5400, 86400, 604800, 3024000]
    for text in ("", "24", "0h", "36d", "-1h", "1y", "²h"):
        with pytest.raises(InputError, match="90m, 24h or 7d"):
            usage.since_of(text)
    assert usage.since_of("24h") == usage.USUAL_S


def test_whole_hours_are_summed() -> None:
    """What is not an account is passed over."""
    hours = [
        {b"requests alice resnet": b"2", b"device_us alice resnet": b"1500000"},
        {b"requests alice resnet": b"1", b"later alice resnet": b"9"},
    ]
    found = usage.parse(7200.5, 3600, hours)
    assert found.to_dict()["usage"] == [
        {
            "key": "alice",
            "model": "resnet",
            "requests": 3,
            "errors": 0,
            "refused": 0,
            "bytes_in": 0,
            "bytes_out": 0,
            "device_s": 1.5,
        }
    ]
    assert found.to_dict()["since"] == "1970-01-01T01:00:00+00:00"
    assert found.by("key").accounts[0].model == ""
    assert found.only("bob").accounts == ()


def request(**scope: Any) -> dict[str, Any]:
    return {"type": "http", **scope}


def test_a_request_counts_for_its_key_and_model() -> None:
    """Refused is what had no room; a model that nobody knows has no name here."""
    accounts = Accounts()
    alice = SimpleNamespace(name="alice")
    accounts.add(request(**{CALLER: alice, MODEL: "resnet", RECEIVED: 10}), 202, 5, None)
    accounts.add(request(**{CALLER: alice, MODEL: "resnet", RECEIVED: 10}), 429, 7, "queue_full")
    accounts.add(request(**{CALLER: alice, MODEL: "made-up"}), 404, 1, "unknown_model")
    accounts.add(request(), 200, 1, None)
    tally = accounts.gather()
    assert tally.used == {"alice"}
    assert tally.usage == {
        "requests alice resnet": 2,
        "refused alice resnet": 1,
        "bytes_in alice resnet": 20,
        "bytes_out alice resnet": 12,
        "requests alice -": 1,
        "errors alice -": 1,
        "bytes_out alice -": 1,
        "requests - -": 1,
        "bytes_out - -": 1,
    }
    assert tally.counts == {
        "status 202 -": 1,
        "status 429 -": 1,
        "status 404 -": 1,
        "status 200 -": 1,
        "error queue_full -": 1,
        "error unknown_model -": 1,
    }
