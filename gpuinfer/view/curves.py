# SPDX-License-Identifier: Apache-2.0
"""Curves of the watchers' series over the last hour, or another span."""

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


def read(client: redis.Redis, since_s: float) -> tuple[Sequence[Curve], str]:
    """Return the curves, or why there are none. Raises redis-py's errors."""
    try:
        found = series.read(client, [*SHOWN], since_s, round(since_s / POINTS))
    except redis.exceptions.NoPermissionError:
        return (), "this user may not read the history"
    curves = []
    for name, (title, unit) in SHOWN.items():
        values = found.values[name]
        if unit == _PERCENT:
            values = tuple(None if value is None else 100 * value for value in values)
        if any(value is not None for value in values):
            curves.append(Curve(name=title, unit=unit, values=values, step_s=found.step_s))
    return curves, "" if curves else "no history yet"
