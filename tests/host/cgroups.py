# SPDX-License-Identifier: Apache-2.0
"""A control group of its own for each container.

nspawn with --keep-unit puts a container below the group that it runs in itself. Two containers at a time
would share the groups of all their units: a stop in one waits for processes of the other, and a start fails
with 219/CGROUP when the other one's systemd removes the group in that moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.host.root import HostError

#: A container is given the unified hierarchy, and this one where the others are of version 1.
_NAMED = "name=systemd"
_GONE_S = 60.0


def enter(name: str) -> list[str]:
    """Make a container's groups; return what runs a command in them, to be put before it. Raises OSError."""
    groups = [*_groups(name)]
    for group in groups:
        group.mkdir(exist_ok=True)
    moves = "".join(f"echo 0 >'{group}/cgroup.procs' || exit; " for group in groups)
    return ["sh", "-c", f'{moves}exec "$@"', "sh"]


def remove(name: str) -> None:
    """End what still runs in a container's groups, and remove them. Raises HostError where some stay."""
    groups = [group for group in _groups(name) if group.exists()]
    for group in groups:
        if (group / "cgroup.kill").exists():  # in the unified one; the same processes are in the other
            (group / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + _GONE_S
    while groups := [group for group in groups if not _removed(group)]:
        if time.monotonic() > deadline:
            raise HostError(f"cannot be removed: {', '.join(map(str, groups))}")
        time.sleep(0.05)


def _removed(group: Path) -> bool:
    """Remove a group with those below it; tell whether nothing of it is left."""
    for folder in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            folder.rmdir()
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


def _groups(name: str) -> Iterator[Path]:
    """Return a container's group in each hierarchy, below the one that this process is in."""
    own = {
        controller: path
        for _, controller, path in (
            line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()
        )
    }
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split()
        controller = _NAMED if kind == "cgroup" and _NAMED in options.split(",") else ""
        if kind == "cgroup2" or controller:
            root, point = left.split()[3:5]
            below = Path(own[controller]).relative_to(root)
            yield Path(point) / below / f"gpuinfer-{name}"


__all__ = ["enter", "remove"]
