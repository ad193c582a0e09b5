# SPDX-License-Identifier: Apache-2.0
"""Counts in sentences for people: ``1 task waits``, ``1,200 tasks wait``."""

from __future__ import annotations


def many(count: int, one: str, several: str = "") -> str:
    """Return a count with its noun; ``several`` is the plural where that is not ``one`` with an s."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def tasks_wait(count: int) -> str:
    """Return a clause, "1 task waits" or "2 tasks wait"."""
    return many(count, "task waits", "tasks wait")
