# SPDX-License-Identifier: Apache-2.0
"""Pages of tasks that have ended, from what the script returns."""

from __future__ import annotations

import pytest

from gpuinfer.errors import InputError
from gpuinfer.queue.history import LOOK, SEARCHED, Search

pytestmark = pytest.mark.unit

NOW = 1_700_000_000.0


def entry(at: int, label: str = "completed realtime digits", error: str = "") -> bytes:
    """Return an entry of a task whose id is its age in microseconds."""
    return f"{int(NOW * 1e6) - at} {label}\n{at}\n{error}".encode()


def test_a_page_and_the_next() -> None:
    """A page ends where it is full; the next begins behind its last task."""
    search = Search(model="digits", limit=2)
    assert search.args == [0, "", LOOK]
    others = [entry(1, "cancelled"), entry(2, "completed batch other"), b"junk", entry(3)]
    search.take([*others, entry(4, "failed realtime digits", "ShapeMismatch"), entry(5)], NOW)
    assert search.done
    page = search.page
    assert [(task.id, task.status, task.error) for task in page.tasks] == [
        ("3", "completed", ""),
        ("4", "failed", "shape_mismatch"),
    ]
    assert page.before == "1699999999.999996"
    following = Search(before=page.before)
    assert following.args[1] == int(NOW * 1e6) - 4
    following.take([entry(5)], NOW)
    assert (following.done, following.page.before) == (True, None)


def test_failures_of_a_day() -> None:
    """What failed longer ago is not listed, though it is still there."""
    search = Search(status="failed")
    assert search.args[0] == 1
    search.take([entry(1, "dead realtime x", "DeadLettered"), entry(86400_000_001, "failed realtime x")], NOW)
    assert [task.error for task in search.page.tasks] == ["dead_lettered"]
    assert search.done and search.page.before is None


def test_a_search_ends() -> None:
    """One that finds little looks at so many, and says where to go on."""
    search, calls = Search(status="expired"), 0
    while not search.done:
        search.take([entry(calls * LOOK + i) for i in range(1, LOOK + 1)], NOW)
        calls += 1
    assert calls == SEARCHED // LOOK
    assert search.page.tasks == [] and search.page.before is not None


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"status": "done"}, "status"),
        ({"status": "queued"}, "status"),
        ({"model": "No@me"}, "model"),
        ({"before": "yesterday"}, "before"),
        ({"before": "-1"}, "before"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
    ],
)
def test_what_cannot_be_asked(given: dict[str, str], field: str) -> None:
    """The field is named."""
    with pytest.raises(InputError) as caught:
        Search(**given)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_time() -> None:
    """Seconds since the epoch, or ISO 8601."""
    assert Search(before="2023-11-14T22:13:20Z").args[1] == Search(before=NOW).args[1] == int(NOW * 1e6)
