# SPDX-License-Identifier: Apache-2.0
"""Pauses between restarts, and the request log of several processes."""

from __future__ import annotations

import socket

import orjson
import pytest
import structlog

from gpuinfer.api.processes import FIRST_PAUSE_S, LONGEST_PAUSE_S, pause_after
from gpuinfer.api.relay import Link, Relay
from gpuinfer.api.request_log import NAMED_MISTAKES, RequestLog

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("crashes", "pause_s"), [(1, FIRST_PAUSE_S), (3, 4 * FIRST_PAUSE_S), (10**6, LONGEST_PAUSE_S)]
)
def test_pauses_double_up_to_a_bound(crashes: int, pause_s: float) -> None:
    """A process that crashes in a row keeps no core busy."""
    assert pause_after(crashes) == pause_s


def test_several_processes_have_one_log() -> None:
    """One line of counts, and one episode for a trouble that all of them have."""
    writer = RequestLog()
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs:
                relay = Relay(Link(theirs))
                for _ in range(3):
                    relay.add("task_accepted", 202, 0.5, {"status": 202})
                for _ in range(NAMED_MISTAKES):
                    relay.add("request", 404, 0.1, {"status": 404, "path": "/x"})
                relay.add(
                    "request", 503, 0.1, {"status": 503, "code": "broker_unavailable", "reason": "away"}
                )
                relay.tick()
                writer.add_told(orjson.loads(ours.recv(1 << 20))["requests"])
        writer.close()
    events = [line["event"] for line in lines]
    assert events.count("request") == NAMED_MISTAKES
    assert [event for event in events if event != "request"] == [
        "requests_refused",
        "requests",
        "requests_refused_no_more",
    ]
    counts = next(line for line in lines if line["event"] == "requests")
    assert (counts["succeeded"], counts["accepted"], counts["mistakes"]) == (6, 6, 2 * NAMED_MISTAKES)


def test_what_the_parent_cannot_take_is_told_later() -> None:
    """A full buffer loses no count."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        link = Link(theirs)
        relay = Relay(link)
        while link.send({"ready": True}):
            continue
        relay.add("request", 200, 0.1, {})
        relay.tick()
        while orjson.loads(ours.recv(1 << 20)):
            if not relay._told:
                break
            relay.tick()
        assert not relay._told
