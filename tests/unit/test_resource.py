# SPDX-License-Identifier: Apache-2.0
"""A task as HTTP shows it."""

from __future__ import annotations

import pytest

from gpuinfer.client.calls import bulk
from gpuinfer.client.submissions import build
from gpuinfer.errors import TaskRevoked
from gpuinfer.queue import results
from gpuinfer.queue.position import spot_of
from gpuinfer.queue.resource import Place, to_resource
from gpuinfer.settings import QueueSettings

pytestmark = pytest.mark.unit

ABOUT = {
    "queue": "realtime",
    "model": "digits",
    "version": "sha256:0123456789ab",
    "attempt": 2,
    "run_ms": 1.5,
    "batch_size": 8,
    "expires": 1_700_000_100.0,
    "metadata": {"user": "7"},
}


def test_a_task_that_completed() -> None:
    """Everything that the worker tells, with the caller's own map and where to go from here."""
    times = {"sent_at": 1_700_000_000.0, "began_at": 1_700_000_000.25}
    meta = results.success("a b", [1], worker="gpu0@here", redelivered=True, times=times, about=ABOUT)
    body = to_resource(results.parse("a b", meta))
    assert body.pop("completed_at").endswith("+00:00")
    assert body == {
        "id": "a b",
        "status": "completed",
        "model": "digits",
        "version": "sha256:0123456789ab",
        "queue": "realtime",
        "priority": 0,
        "created_at": "2023-11-14T22:13:20+00:00",
        "started_at": "2023-11-14T22:13:20.250000+00:00",
        "expires_at": "2023-11-14T22:15:00+00:00",
        "attempt": 2,
        "redelivered": True,
        "result": [1],
        "metrics": {"queue_ms": 250.0, "run_ms": 1.5, "batch_size": 8},
        "worker": "gpu0@here",
        "metadata": {"user": "7"},
        "urls": {
            "self": "/tasks/a%20b",
            "result": "/tasks/a%20b/result",
            "cancel": "/tasks/a%20b/cancel",
            "retry": "/tasks/a%20b/retry",
        },
    }


def test_a_task_that_was_cancelled() -> None:
    """It is called cancelled, and has its error; what is not known is null."""
    meta = results.failure("1", TaskRevoked("it was cancelled"), worker="")
    body = to_resource(results.parse("1", meta))
    assert body["status"] == "cancelled"
    assert body["error"]["code"] == "revoked"
    assert body["worker"] is None
    assert body["metrics"] == {"queue_ms": None, "run_ms": None, "batch_size": None}
    assert "result" not in body


def test_a_task_that_waits_or_runs() -> None:
    """Where it stands, or where it runs and how far it is."""
    waits = to_resource(results.parse("1", results.PENDING_META), Place(3, 1_700_000_000.0))
    assert waits["status"] == "queued"
    assert (waits["position"], waits["estimated_start_at"]) == (3, "2023-11-14T22:13:20+00:00")
    assert waits["metadata"] == {}
    meta = results.started("1", "gpu0@here", 7, 0.5, times={"began_at": 1_700_000_000.0}, about=ABOUT)
    runs = to_resource(results.parse("1", meta))
    assert (runs["status"], runs["progress"], runs["worker"]) == ("running", 0.5, "gpu0@here")
    assert (runs["model"], runs["started_at"]) == ("digits", "2023-11-14T22:13:20+00:00")
    assert "position" not in runs and "metrics" not in runs


WAITS = {"queue": "realtime", "model": "digits", "place": [1, 10, 29, 1]}


def waiting(about: object, sent_at: float = 1000.0) -> results.TaskStatus:
    return results.from_body("1", {"status": "PENDING", "result": None, "about": about, "sent_at": sent_at})


def test_a_place_by_the_counters() -> None:
    """By what was claimed since it came; no further than its list is long; and when that began to move."""
    spot = spot_of(waiting(WAITS))
    assert spot is not None
    assert (spot.list, spot.counter) == ("realtime", "realtime digits")
    assert spot.place(length=30, claimed=10, now=1005.0) == Place(30, None)
    assert spot.place(length=40, claimed=30, now=1005.0) == Place(10, 1007.5)
    assert spot.place(length=4, claimed=30, now=1005.0) == Place(4, 1006.0), "tasks were purged"
    assert spot.place(length=40, claimed=41, now=1005.0) == Place(0, 1005.0)
    lone = spot_of(waiting(WAITS | {"place": [1, -1, 0, 1]}))
    assert lone is not None
    assert lone.place(length=5, claimed=30, now=1005.0) == Place(1, None)
    assert spot.place(length=40, claimed=30, now=999.0) == Place(10, None), "clocks differ"


def test_the_list_of_a_task_that_waits() -> None:
    """By tier, model, caller and priority."""
    spot = spot_of(waiting(WAITS | {"place": [0, 1, 2, 1], "priority": 9, "caller": "alice"}))
    assert spot is not None
    assert spot.list == spot.counter == "realtime.digits@alice\x06\x169"


@pytest.mark.parametrize(
    "wrong",
    [
        {"place": [1, 2]},
        {"place": [1, 2, 3, "4"]},
        {"place": [1, 2, 3, 0]},
        {"place": None},
        {"queue": "celery"},
        {"model": "a b", "place": [0, 1, 2, 1]},
        {"priority": 10},
    ],
)
def test_no_place(wrong: dict[str, object]) -> None:
    """What waits for its time has none yet, and what others write there is not read."""
    assert spot_of(waiting(WAITS | wrong)) is None


def test_the_halves_of_a_call_are_numbered_anew() -> None:
    """The first half waits when the second comes; what waits for its time has no number."""
    for countdown_s, numbers in ((None, [1, 2, 3]), (5.0, [0, 0, 0])):
        tasks = [build([1], many=False, countdown_s=countdown_s) for _ in range(6)]
        (call,) = bulk(tasks, QueueSettings())
        for half in call.halves():
            assert [int(str(end).split("]")[0].strip("b'")) for end in half.args[13::3]] == numbers


@pytest.mark.parametrize(
    "meta", ['{"status": "SUCCESS", "about": 5}', '{"status": "STARTED", "about": {"metadata": 1}}']
)
def test_what_others_write_there(meta: str) -> None:
    """What cannot be read of it is left out."""
    body = to_resource(results.parse("1", meta))
    assert (body["model"], body["metadata"]) == (None, {})
