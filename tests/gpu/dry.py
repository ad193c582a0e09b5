# SPDX-License-Identifier: Apache-2.0
"""Whether this is a dry run, and what the stub's pretended GPU holds; light, as every process reads it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

GIB = 1024**3
#: What each process that uses the pretended GPU has of its memory.
PROCESS_BYTES = GIB
TOTAL_BYTES = 24 * GIB


def folder() -> Path | None:
    """Return the folder in which the pretended GPU keeps its state; None in a real run."""
    found = os.environ.get("GPU_CHECK_STUB")
    return Path(found) if found else None


def dry_run() -> bool:
    """Tell whether there is no GPU but the stub's."""
    return folder() is not None


def use(held_bytes: int = PROCESS_BYTES) -> None:
    """Let this process hold memory of the pretended GPU for as long as it lives."""
    place = folder()
    if place is not None:
        (place / str(os.getpid())).write_text(str(held_bytes), encoding="ascii")


def users() -> dict[int, int]:
    """Return the living processes that use the pretended GPU, with what each holds."""
    found, place = {}, folder()
    for file in place.iterdir() if place is not None else ():
        with suppress(OSError, ValueError):  # it is being written, or has ended
            os.kill(int(file.name), 0)
            if Path(f"/proc/{file.name}/stat").read_text(encoding="ascii").rpartition(") ")[2][0] != "Z":
                found[int(file.name)] = int(file.read_text(encoding="ascii"))
    return found


def full() -> bool:
    """Tell whether the pretended GPU has no room for another process."""
    return sum(users().values()) + PROCESS_BYTES > TOTAL_BYTES
