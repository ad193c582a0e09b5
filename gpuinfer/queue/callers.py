# SPDX-License-Identifier: Apache-2.0
"""Removes the data that Redis keeps per caller: it grows with each new caller, and most can be recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The hashes that the script ``tidy`` cleans.
_HASHES = ("claimed", "turns", "room", "rates")


def tidy(script: Callable[..., Any]) -> None:
    """Remove the data of callers that have nothing waiting. Raises redis-py's errors.

    Runs the script ``tidy`` in many small steps, so that Redis can serve others in between.
    """
    for name in _HASHES:
        cursor: Any = 0
        while cursor != b"0":
            cursor = script(args=[name, cursor])
