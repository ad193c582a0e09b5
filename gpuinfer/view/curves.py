# SPDX-License-Identifier: Apache-2.0
"""Curves of the metrics history over the last hour, or another span."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from gpuinfer.queue import series
from gpuinfer.view.model import Curve

#: The approximate number of points of a curve.
POINTS = 60
#: Series -> its name on the screen, and its unit.
SHOWN = {
    "ended": ("done", "/s"),
    "failed": ("failed", "/s"),
    "waiting": ("waiting", ""),
    "busy": ("busy", "%"),
}
_PERCENT = "%"
#: If the last entry is older than this many seconds, no history is being written.
_LATEST_S = 60.0


def read(client: redis.Redis, since_s: float) -> tuple[Sequence[Curve], str]:
    """Return the curves, or why there are none. Raises redis-py's errors."""
    try:
        found = series.read(client, [*SHOWN], since_s, round(since_s / POINTS))
        latest = series.read(client, [*SHOWN], _LATEST_S)
    except redis.exceptions.NoPermissionError:
        return (), "this user may not read the history"
    curves = []
    for name, (title, unit) in SHOWN.items():
        scale = 100 if unit == _PERCENT else 1
        values = tuple(None if value is None else scale * value for value in found.values[name])
        now = next((scale * value for value in reversed(latest.values[name]) if value is not None), None)
        if any(value is not None for value in values):
            curves.append(Curve(name=title, unit=unit, values=values, step_s=found.step_s, now=now))
    return curves, "" if curves else "no history yet"
