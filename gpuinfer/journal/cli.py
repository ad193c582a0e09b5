# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer logs``: journalctl with the options that select gpuinfer's lines."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from gpuinfer.errors import InputError, JournalUnavailable

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded

#: Option -> the units it means.
UNITS = {
    "api": "gpuinfer-api.service",
    "worker": "gpuinfer-worker@*.service",
    "watcher": "gpuinfer-watcher.service",
    "redis": "gpuinfer-redis.service",
}
ALL_UNITS = "gpuinfer-*"
#: Our levels -> journalctl's names for them.
LEVELS = {"critical": "crit", "error": "err", "warning": "warning", "info": "info", "debug": "debug"}
#: What an id may be: Celery's are UUIDs, but a producer may choose its own.
_ID = re.compile(r"[!-~]{1,200}")

_EXAMPLES = """\b
Examples:
  gpuinfer logs --follow                  everything, as it is logged
  gpuinfer logs --task 6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21
  gpuinfer logs --gpu 0 --since '1 hour ago' -p warning
  gpuinfer logs --worker --json -n 100    one object per line, with all fields
"""


@click.command(epilog=_EXAMPLES)
@click.option("--task", metavar="ID", help="All lines about this task, from any unit.")
@click.option("--gpu", type=click.IntRange(0), metavar="N", help="The worker of GPU N.")
@click.option("--api", is_flag=True, help="The HTTP API.")
@click.option("--worker", is_flag=True, help="All workers.")
@click.option("--watcher", is_flag=True, help="The watcher.")
@click.option("--redis", is_flag=True, help="Redis.")
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they are logged.")
@click.option("--since", metavar="TIME", help="Start there: '10 min ago', today, '2026-01-31 08:00'.")
@click.option("-n", "--lines", type=click.IntRange(0), metavar="LINES", help="Only the last LINES lines.")
@click.option("-p", "--priority", type=click.Choice(list(LEVELS)), help="This level and above.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def logs(
    loaded: Loaded,
    /,
    task: str | None,
    gpu: int | None,
    follow: bool,
    since: str | None,
    lines: int | None,
    priority: str | None,
    as_json: bool,
    **chosen: bool,
) -> None:
    """Show the journal of a task, a GPU or all units.

    Runs journalctl and ends with its exit code. Reading the journal needs root, or the group systemd-journal.
    --task ID, without a choice of units or lines, adds the task's result record: when it was submitted, began
    and ended, and how. Under load the journal names only tasks with problems (log.named_tasks); the result
    record covers every task.
    """
    units = [UNITS[name] for name in UNITS if chosen[name]]
    if gpu is not None:
        units.append(f"gpuinfer-worker@{gpu}.service")
    options = arguments(units, task=task, since=since, lines=lines, priority=priority)
    options += ["--follow"] * follow + ["--output=json"] * as_json
    path = shutil.which("journalctl")
    if path is None:
        raise JournalUnavailable("there is no journalctl here: processes log to their standard error")
    if task is not None and not units and since is None and lines is None and priority is None:
        from gpuinfer.journal.story_cli import tell

        tell(loaded, path, task, follow=follow, as_json=as_json)
        return
    os.execv(path, ["journalctl", *options])  # noqa: S606  no shell is wanted; the options are checked


def arguments(
    units: Sequence[str],
    *,
    task: str | None = None,
    since: str | None = None,
    lines: int | None = None,
    priority: str | None = None,
) -> list[str]:
    """Return journalctl's arguments. Raises InputError for what is no task id.

    A task's lines are asked for by its id alone: the line of a process that ended at once may have
    reached the journal without its unit.
    """
    wanted = list(units) or ([] if task is not None else [ALL_UNITS])
    found = [f"--unit={unit}" for unit in wanted]
    if since is not None:
        found.append(f"--since={since}")
    if lines is not None:
        found.append(f"--lines={lines}")
    if priority is not None:
        found.append(f"--priority={LEVELS[priority]}")
    if task is not None:
        if not _ID.fullmatch(task):
            raise InputError("must be a task id: 1 to 200 printable characters, no spaces", "--task")
        found.append(f"TASK_ID={task}")
    return found
