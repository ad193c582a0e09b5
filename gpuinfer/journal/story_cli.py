# SPDX-License-Identifier: Apache-2.0
"""The log of one task, for ``gpuinfer logs --task``: journal entries and the result record, in order of time.

Under load the journal names only tasks with problems. The result record says when a task was submitted,
began and ended, and how, for as long as it is kept (``queue.result_ttl_s``). It is converted into journal
entries, so that both are sorted and printed in the same way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from gpuinfer.errors import BrokerError, ConfigError, JournalUnavailable, TaskNotFound
from gpuinfer.journal.sender import say_warning

if TYPE_CHECKING:
    from gpuinfer.queue.results import TaskStatus
    from gpuinfer.settings import Loaded

Entry = dict[str, Any]
_AT = "__REALTIME_TIMESTAMP"


def tell(loaded: Loaded, journalctl: str, task_id: str, *, follow: bool, as_json: bool) -> None:
    """Print the log of a task; with ``follow``, continue as journalctl.

    Raises TaskNotFound where neither the journal nor Redis knows the task, JournalUnavailable where
    journalctl fails.
    """
    told = _journal(journalctl, task_id)
    try:
        recorded = list(_record(loaded, task_id))
    except TaskNotFound:
        recorded = []
        if told:
            say_warning(
                "there is no result record: it has expired or was deleted; only the journal's lines follow"
            )
    except (BrokerError, ConfigError) as exc:
        recorded = []
        say_warning(f"the result record cannot be read, only the journal's lines follow: {exc}")
        if not told and not follow:
            raise
    if not told and not recorded and not follow:
        raise TaskNotFound(f"neither the journal nor Redis knows a task {task_id}", "--task")
    for entry in sorted([*told, *recorded], key=lambda entry: int(entry[_AT])):
        click.echo(json.dumps(entry) if as_json else _line(entry))
    if follow:
        after = [f"--after-cursor={told[-1]['__CURSOR']}"] if told else ["--lines=0"]
        form = ["--output=json"] if as_json else []
        os.execv(journalctl, ["journalctl", f"TASK_ID={task_id}", "--follow", *after, *form])  # noqa: S606


def lines(loaded: Loaded, task_id: str) -> list[str]:
    """Return the log of a task, line by line. Raises BrokerError.

    From the journal, where there is one that this user may read, and from the result record while it is kept.
    """
    told: list[Entry] = []
    path = shutil.which("journalctl")
    if path is not None:
        with suppress(JournalUnavailable):
            told = _journal(path, task_id)
    with suppress(TaskNotFound):
        told += _record(loaded, task_id)
    return [_line(entry) for entry in sorted(told, key=lambda entry: int(entry[_AT]))]


def _journal(journalctl: str, task_id: str) -> list[Entry]:
    command = [journalctl, f"TASK_ID={task_id}", "--output=json", "--all", "--quiet", "--no-pager"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode and not done.stdout:
        raise JournalUnavailable(f"journalctl failed: {done.stderr.strip() or done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _record(loaded: Loaded, task_id: str) -> Iterator[Entry]:
    """Yield entries for the result record. Raises TaskNotFound, BrokerError, ConfigError."""
    from gpuinfer.client import Client

    with Client(loaded.settings) as client:
        status = client.status(task_id)
    for at, action, message in moments(status):
        yield {
            _AT: str(int(at.timestamp() * 1_000_000)),
            "SYSLOG_IDENTIFIER": "result record",
            "PRIORITY": "6",
            "ACTION": action,
            "MESSAGE": message,
            "TASK_ID": task_id,
        }


def moments(status: TaskStatus, now: datetime | None = None) -> Iterator[tuple[datetime, str, str]]:
    """Yield (time, action, sentence) for each event in a result record. ``now``: when it was read."""
    from gpuinfer.queue.results import moment

    sent, began, ended = (moment(at) for at in (status.sent_at, status.began_at, status.ended_at))
    on = f" on {status.worker}" if status.worker else ""
    if sent is not None:
        yield sent, "submitted", "submitted"
    if began is not None:
        yield began, "began", f"began{on}{_after(sent, began, 'it was submitted')}"
    if not status.final:
        words = "waits in the queue" if status.state == "queued" else f"is running{on}"
        yield now or datetime.now(UTC), status.state, words
    elif ended is not None:
        words = (
            f"{status.state}{on}{_after(began, ended, 'it began') or _after(sent, ended, 'it was submitted')}"
        )
        words += "; not its first execution" if status.redelivered else ""
        words += f": {status.error.code}: {status.error}" if status.error is not None else ""
        yield ended, status.state, words


def _after(first: datetime | None, then: datetime, event: str) -> str:
    if first is None:
        return ""
    return f", {(then - first).total_seconds() * 1000:,.1f} ms after {event}"


def _line(entry: Entry) -> str:
    """Return an entry as journalctl prints it, with milliseconds."""
    at = datetime.fromtimestamp(int(entry[_AT]) / 1_000_000).astimezone()
    pid = f"[{entry['_PID']}]" if "_PID" in entry else ""
    who = _text(entry.get("SYSLOG_IDENTIFIER") or entry.get("_COMM") or "unknown")
    return f"{at:%b %d %H:%M:%S}.{at.microsecond // 1000:03d} {who}{pid}: {_text(entry.get('MESSAGE'))}"


def _text(value: str | Sequence[int] | None) -> str:
    """Return a field's text without control characters; bytes that are not UTF-8 come as numbers."""
    text = value if isinstance(value, str) else bytes(value or ()).decode(errors="replace")
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
