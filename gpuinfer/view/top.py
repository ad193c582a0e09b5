# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer top``: the fleet live, with an administrator's actions, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static, TabbedContent, TabPane

from gpuinfer.errors import GpuinferError
from gpuinfer.view import rows, words
from gpuinfer.view.actions import Actions, TaskRow
from gpuinfer.view.model import QueueRow, Status, WorkerRow
from gpuinfer.view.rows import Listing
from gpuinfer.view.screen import lines

#: The most lines of problems above the lists.
_TROUBLES = 4
#: State -> its colour.
_COLOURS = {
    "busy": "green",
    "draining": "yellow",
    "drained": "yellow",
    "starting": "cyan",
    "failed": "bold red",
    "silent": "bold red",
    "stopped": "dim",
    "masked": "dim",
    "paused": "bold yellow",
}


class Story(ModalScreen[None]):
    """The log of one task: lines of the journal and the result record."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,enter", "dismiss", "Back")]
    CSS = "Story { align: center middle; } Story > VerticalScroll { width: 90%; height: 80%; border: round; }"

    def __init__(self, title: str, found: Sequence[str]) -> None:
        super().__init__()
        self._title, self._found = title, found

    def compose(self) -> ComposeResult:
        """Show the lines."""
        with VerticalScroll() as box:
            box.border_title = self._title
            text = "\n".join(self._found) or "no log lines and no result record are left"
            yield Static(Text(text), id="story")


class Top(App[None]):
    """The application. ``look`` and ``actions`` block, and are called in threads."""

    TITLE = "gpuinfer top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title { height: 1; }
    #trouble { height: auto; max-height: 8; }
    #filter { display: none; height: 3; }
    #filter.shown { display: block; }
    #said { height: 1; }
    Screen { overflow: hidden; }
    TabbedContent { height: 1fr; }
    TabPane { height: 1fr; padding: 0; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        Binding("1", "show('workers')", "Workers", show=False),
        Binding("2", "show('queues')", "Queues", show=False),
        Binding("3", "show('tasks')", "Tasks", show=False),
        ("s", "sort", "Sort"),
        ("S", "reverse", "Reverse"),
        ("slash", "filter", "Filter"),
        ("d", "drain", "Drain"),
        ("p", "pause", "Pause"),
        ("r", "retry", "Retry"),
        ("l", "log", "Log"),
    ]

    def __init__(self, look: Callable[[], Status], actions: Actions, *, every_s: float = 1.0) -> None:
        super().__init__()
        self._look = look
        self._actions = actions
        self._every_s = every_s
        self.status: Status | None = None
        self.tasks: Sequence[TaskRow] = ()
        #: List -> the column it is sorted by (-1: unsorted), and whether in reverse.
        self._sorting: dict[str, tuple[int, bool]] = dict.fromkeys(
            ("workers", "queues", "tasks"), (-1, False)
        )
        self._filter = ""

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield Static(id="title")
        yield Static(id="trouble")
        yield Input(placeholder="show rows that contain these words; Enter keeps, Escape clears", id="filter")
        with TabbedContent(initial="workers"):
            for place, name in enumerate(self._sorting, start=1):
                with TabPane(f"{place} {name.capitalize()}", id=name):
                    yield DataTable(id=f"{name}-table", cursor_type="row", zebra_stripes=True)
        yield Static(id="said")
        yield Footer()

    def on_mount(self) -> None:
        """Start probing."""
        self.refresh_now()
        self.set_interval(self._every_s, self.refresh_now)
        self.table("workers").focus()

    # -- probing --------------------------------------------------------------------------

    @work(thread=True, exclusive=True, group="look")
    def refresh_now(self) -> None:
        """Probe once, in another thread; an error is shown, and the next probe tries again."""
        try:
            status, tasks = self._look(), self._actions.tasks()
        except GpuinferError as exc:
            self.call_from_thread(self.say, str(exc))
            return
        self.call_from_thread(self._show, status, tasks)

    def _show(self, status: Status, tasks: Sequence[TaskRow]) -> None:
        self.status, self.tasks = status, tasks
        above = list(lines(status, max(60, self.size.width), 2 * _TROUBLES))
        self.query_one("#title", Static).update(above[0])
        count = sum(1 + bool(one.remedy) for one in status.troubles[:_TROUBLES])
        self.query_one("#trouble", Static).update(Text("\n").join(above[1 : 1 + count]))
        self._fill()

    def _listing(self, name: str) -> tuple[Listing[Any], Sequence[Any]]:
        if self.status is None:
            return rows.TASKS, ()
        if name == "workers":
            return rows.workers(self.status), self.status.workers
        return (rows.QUEUES, self.status.queues) if name == "queues" else (rows.TASKS, self.tasks)

    def _fill(self) -> None:
        for name in self._sorting:
            listing, found = self._listing(name)
            column, reverse = self._sorting[name]
            arranged = listing.arranged(found, self._filter, column, reverse)
            self._fill_table(self.table(name), listing, arranged, column, reverse)

    def _fill_table(
        self, table: DataTable[Any], listing: Listing[Any], found: Sequence[Any], column: int, reverse: bool
    ) -> None:
        """Redraw a table; the cursor stays on its row, wherever that is now."""
        before = self._selected(table)
        arrow = " ▼" if reverse else " ▲"
        heads = [
            field.name + (arrow if place == column else "") for place, field in enumerate(listing.fields)
        ]
        table.clear(columns=True)
        for head in heads:
            table.add_column(head)
        for row in found:
            cells = [
                Text(
                    text := field.text(row),
                    _COLOURS.get(text, ""),
                    justify="right" if field.right else "left",
                )
                for field in listing.fields
            ]
            table.add_row(*cells, key=listing.name(row))
        if before is not None and before in (names := [listing.name(row) for row in found]):
            table.move_cursor(row=names.index(before), animate=False)

    def table(self, name: str) -> DataTable[Any]:
        """Return the table of a list."""
        found: DataTable[Any] = self.query_one(f"#{name}-table", DataTable)
        return found

    @property
    def shown(self) -> str:
        """Return the list that is in front."""
        return self.query_one(TabbedContent).active

    def _selected(self, table: DataTable[Any]) -> str | None:
        if not table.row_count:
            return None
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

    def say(self, text: str) -> None:
        """Show one line below the lists."""
        self.query_one("#said", Static).update(
            Text(words.cut(" ".join(text.split()), max(20, self.size.width)))
        )

    # -- keys -----------------------------------------------------------------------------

    def action_show(self, name: str) -> None:
        """Bring a list to the front."""
        self.query_one(TabbedContent).active = name
        self.table(name).focus()

    def action_sort(self) -> None:
        """Sort by the next column; after the last one, do not sort."""
        listing, _ = self._listing(self.shown)
        column, reverse = self._sorting[self.shown]
        column = column + 1 if column + 1 < len(listing.fields) else -1
        self._sorting[self.shown] = column, reverse
        self._fill()

    def action_reverse(self) -> None:
        """Reverse the order."""
        column, reverse = self._sorting[self.shown]
        self._sorting[self.shown] = max(column, 0), not reverse
        self._fill()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """Sort by the column that was clicked; a second click reverses the order."""
        column, reverse = self._sorting[self.shown]
        place = event.column_index
        self._sorting[self.shown] = place, not reverse if place == column else False
        self._fill()

    def action_filter(self) -> None:
        """Show the filter."""
        box = self.query_one("#filter", Input)
        box.add_class("shown")
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Apply the filter while it is typed."""
        self._filter = event.value
        self._fill()

    def on_input_submitted(self) -> None:
        """Keep the filter, and go back to the list."""
        self._leave_filter()

    def key_escape(self) -> None:
        """Clear the filter."""
        self.query_one("#filter", Input).value = ""
        self._leave_filter()

    def _leave_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.set_class(bool(box.value), "shown")
        self.table(self.shown).focus()

    def _row(self, name: str) -> Any:
        """Return the row under the cursor; if another list is in front, say so and return None."""
        if self.shown != name:
            self.say(f"select one of the {name} first")
            return None
        wanted = self._selected(self.table(name))
        listing, found = self._listing(name)
        return next((row for row in found if listing.name(row) == wanted), None)

    def action_drain(self) -> None:
        """Drain the worker under the cursor, or resume it."""
        row: WorkerRow | None = self._row("workers")
        if row is not None:
            worker, drained = rows.worker_name(row), row.state not in ("draining", "drained")
            self.act(
                partial(self._actions.drain, worker, drained),
                f"{worker}: {'drained' if drained else 'resumed'}",
            )

    def action_pause(self) -> None:
        """Pause the queue under the cursor, or resume it."""
        row: QueueRow | None = self._row("queues")
        if row is not None:
            queue, paused = rows.queue_name(row), not row.paused
            self.act(
                partial(self._actions.pause, queue, paused), f"{queue}: {'paused' if paused else 'resumed'}"
            )

    def action_retry(self) -> None:
        """Retry the task under the cursor."""
        row: TaskRow | None = self._row("tasks")
        if row is not None:
            self.act(partial(self._actions.retry, row.id), f"{row.id}: retried")

    def action_log(self) -> None:
        """Show the log of the task under the cursor."""
        row: TaskRow | None = self._row("tasks")
        if row is not None:
            self.tell(row.id)

    @work(thread=True, group="act")
    def act(self, call: Callable[[], object], done: str) -> None:
        """Run an action, and show its result or its error."""
        try:
            changed = call()
        except GpuinferError as exc:
            self.call_from_thread(self.say, f"not done: {exc}")
            return
        self.call_from_thread(self.say, f"{done} already" if changed is False else done)
        self.call_from_thread(self.refresh_now)

    @work(thread=True, group="act")
    def tell(self, task_id: str) -> None:
        """Read the log of a task, and show it."""
        try:
            found = self._actions.log(task_id)
        except GpuinferError as exc:
            self.call_from_thread(self.say, str(exc))
            return
        self.call_from_thread(self.push_screen, Story(task_id, found))
