# SPDX-License-Identifier: Apache-2.0
"""What is kept of callers: it grows with each that ever came, and most of it can be made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The hashes that the script ``tidy`` looks through.
_HASHES = ("claimed", "turns", "room", "rates")


def tidy(script: Callable[..., Any]) -> None:
    """Forget what is kept of callers that have nothing waiting. Raises redis-py's errors.

    Many small steps of the script ``tidy``, so that Redis serves others in between.
    """
    for name in _HASHES:
        cursor: Any = 0
        while cursor != b"0":
            cursor = script(args=[name, cursor])
