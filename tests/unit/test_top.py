# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer top``, by its keys, over recorded values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from gpuinfer.errors import BrokerUnavailable
from gpuinfer.view.actions import TaskRow
from gpuinfer.view.model import GpuRow, QueueRow, RedisRow, Status, Trouble, WorkerRow
from gpuinfer.view.rows import QUEUES, workers
from gpuinfer.view.top import Story, Top

pytestmark = pytest.mark.unit

WORKERS = tuple(
    WorkerRow(number=number, host="a", state=state, rate=rate, models={model: "1"}, queues=("batch",))
    for number, state, rate, model in (
        (0, "busy", 5.0, "resnet"),
        (1, "idle", 0.5, "whisper"),
        (2, "drained", None, "resnet"),
    )
)
STATUS = Status(
    at=1_000_000.0,
    host="a",
    version="1.0",
    troubles=(Trouble(severity="warning", what="1 dead letter", remedy="gpuinfer dead list"),),
    workers=WORKERS,
    queues=(
        QueueRow(tier="realtime", model="resnet", waiting=3, workers=1),
        QueueRow(tier="batch", model="resnet", waiting=9, paused=True),
    ),
    redis=RedisRow(place="x", reachable=True),
)
TASKS = (
    TaskRow(id="t1", status="completed", queue="batch", model="resnet", at="10:00:00"),
    TaskRow(id="t2", status="failed", queue="batch", model="whisper", at="09:59:59", error="task_failed"),
)


class Recorded:
    """Notes what is done; may refuse all of it."""

    def __init__(self) -> None:
        self.done: list[tuple[object, ...]] = []
        self.refuses = False

    def _do(self, *what: object) -> bool:
        if self.refuses:
            raise BrokerUnavailable("Redis does not answer")
        self.done.append(what)
        return True

    def drain(self, worker: str, drained: bool) -> bool:
        """Note it."""
        return self._do("drain", worker, drained)

    def pause(self, queue: str, paused: bool) -> bool:
        """Note it."""
        return self._do("pause", queue, paused)

    def tasks(self) -> Sequence[TaskRow]:
        """Return two."""
        return TASKS

    def retry(self, task_id: str) -> None:
        """Note it."""
        self._do("retry", task_id)

    def log(self, task_id: str) -> Sequence[str]:
        """Return a story of two lines."""
        return [f"{task_id} began", f"{task_id} failed"]


async def settled(pilot: Pilot[None]) -> None:
    """Wait until what was begun in threads is shown."""
    await pilot.app.workers.wait_for_complete()
    await pilot.pause()


def names(top: Top, listing: str) -> list[str | None]:
    """Return what stands in a list, from the top."""
    return [row.key.value for row in top.table(listing).ordered_rows]


def text(top: Top, name: str) -> str:
    """Return what a line shows."""
    return str(top.query_one(name, Static).render())


@pytest.fixture
def actions() -> Recorded:
    return Recorded()


@pytest.fixture
def top(actions: Recorded) -> Top:
    return Top(lambda: STATUS, actions, every_s=3600)


async def test_it_shows_trouble_and_three_lists(top: Top) -> None:
    """As status does; of GPUs nothing where there is none."""
    async with top.run_test(size=(120, 40)) as pilot:
        await settled(pilot)
        assert "1 warning" in text(top, "#title")
        assert "gpuinfer dead list" in text(top, "#trouble")
        assert names(top, "workers") == ["gpu0@a", "gpu1@a", "gpu2@a"]
        assert names(top, "queues") == ["realtime.resnet", "batch.resnet"]
        assert names(top, "tasks") == ["t1", "t2"]
        heads = [str(column.label) for column in top.table("workers").columns.values()]
        assert "rate" in heads and "GPU" not in heads


async def test_sort_and_reverse(top: Top) -> None:
    """By column after column; what is not known stays last; the cursor stays on its row."""
    async with top.run_test(size=(120, 40)) as pilot:
        await settled(pilot)
        await pilot.press("down")
        for _ in range(4):
            await pilot.press("s")
        assert names(top, "workers") == ["gpu1@a", "gpu0@a", "gpu2@a"]  # by rate
        await pilot.press("S")
        assert names(top, "workers") == ["gpu0@a", "gpu1@a", "gpu2@a"]
        assert top.table("workers").cursor_row == 1


async def test_filter(top: Top) -> None:
    """All words must be there; Escape brings all rows back."""
    async with top.run_test(size=(120, 40)) as pilot:
        await settled(pilot)
        await pilot.press("slash", *"resnet busy")
        assert names(top, "workers") == ["gpu0@a"]
        await pilot.press("enter")
        assert top.query_one("#filter", Input).has_class("shown")
        await pilot.press("escape")
        assert len(names(top, "workers")) == 3
        assert not top.query_one("#filter", Input).has_class("shown")


@pytest.mark.parametrize(
    ("keys", "done"),
    [
        (["d"], ("drain", "gpu0@a", True)),
        (["down", "down", "d"], ("drain", "gpu2@a", False)),
        (["2", "p"], ("pause", "realtime.resnet", True)),
        (["2", "down", "p"], ("pause", "batch.resnet", False)),
        (["3", "down", "r"], ("retry", "t2")),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
async def test_what_is_done_to_the_row_under_the_cursor(
    top: Top, actions: Recorded, keys: list[str], done: tuple[object, ...]
) -> None:
    """Done, and said; the same key undoes it."""
    async with top.run_test(size=(120, 40)) as pilot:
        await settled(pilot)
        await pilot.press(*keys)
        await settled(pilot)
        assert actions.done == [done]
        assert str(done[1]) in text(top, "#said")


async def test_a_key_of_another_list_does_nothing(top: Top, actions: Recorded) -> None:
    """And says what to do; what fails is said, too."""
    async with top.run_test(size=(120, 40)) as pilot:
        await settled(pilot)
        await pilot.press("p")
        assert "select one of the queues first" in text(top, "#said") and not actions.done
        actions.refuses = True
        await pilot.press("d")
        await settled(pilot)
        assert "not done: Redis does not answer" in text(top, "#said")


async def test_a_tasks_log(top: Top) -> None:
    """In front of all else, until it is closed."""
    async with top.run_test(size=(120, 40)) as pilot:
        await settled(pilot)
        await pilot.press("3", "down", "l")
        await settled(pilot)
        assert isinstance(top.screen, Story)
        assert "t2 failed" in str(top.screen.query_one("#story", Static).render())
        await pilot.press("escape")
        assert not isinstance(top.screen, Story)


async def test_redis_goes_away_and_comes_back(actions: Recorded) -> None:
    """What was seen last stays, and the reason is said."""
    looks: list[Callable[[], Status]] = []

    def look() -> Status:
        return looks[-1]()

    def away() -> Status:
        raise BrokerUnavailable("Redis does not answer")

    top = Top(look, actions, every_s=3600)
    looks.append(lambda: STATUS)
    async with top.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        looks.append(away)
        top.refresh_now()
        await settled(pilot)
        assert "Redis does not answer" in text(top, "#said") and len(names(top, "workers")) == 3
        looks.append(lambda: replace(STATUS, workers=WORKERS[:1]))
        top.refresh_now()
        await settled(pilot)
        assert names(top, "workers") == ["gpu0@a"]


def test_of_gpus_it_tells_where_there_are_some() -> None:
    """And every number is sorted as a number, not as its text."""
    gpu = replace(WORKERS[0], gpu=GpuRow(index=0, name="H100", temperature_c=70))
    listing = workers(replace(STATUS, workers=(gpu,)))
    assert {"GPU", "memory", "temp"} <= {field.name for field in listing.fields}
    queues = [QueueRow(tier="batch", model=str(n), waiting=n) for n in (10, 9, 100)]
    waiting = [field.name for field in QUEUES.fields].index("waiting")
    assert [one.waiting for one in QUEUES.arranged(queues, "", waiting, True)] == [100, 10, 9]
