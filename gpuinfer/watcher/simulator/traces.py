# SPDX-License-Identifier: Apache-2.0
"""When tasks arrive: patterns made from a seed, and traces read from a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from gpuinfer.errors import InputError
from gpuinfer.settings import QUEUES, QueueName

Pattern = Literal["burst", "diurnal", "flash", "poisson"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
Counts = NDArray[np.int64]
#: The default mean share of the fleet that a pattern asks for; for flash its peak.
LOADS: dict[Pattern, float] = {"burst": 0.01, "diurnal": 0.3, "flash": 0.6, "poisson": 0.35}


@dataclass(frozen=True)
class Trace:
    """Arrivals on a grid of ``step_s`` seconds: for each queue the steps with tasks, and how many."""

    name: str
    seconds: float
    step_s: float
    #: Queue -> (step numbers, rising; tasks of each step, at least 1).
    arrivals: dict[QueueName, tuple[Counts, Counts]]

    @property
    def tasks(self) -> int:
        """Return how many tasks arrive in all."""
        return int(sum(counts.sum() for _, counts in self.arrivals.values()))


def make(
    pattern: Pattern, *, capacity: float, seconds: float, step_s: float, seed: int, load: float | None = None
) -> Trace:
    """Make a trace for a fleet that serves ``capacity`` tasks a second when all of it runs.

    ``load`` is the mean share of the capacity that is asked for (flash: the peak's); None: the pattern's own.
    """
    random = np.random.default_rng(seed)
    times = (np.arange(math.ceil(seconds / step_s)) + 0.5) * step_s
    share = LOADS[pattern] if load is None else load
    per_step = random.poisson(
        _SHAPES[pattern](times.astype(np.float64), seconds, share, random) * capacity * step_s
    )
    steps = np.flatnonzero(per_step)
    return Trace(pattern, seconds, step_s, {"default": (steps, per_step[steps])})


Floats = NDArray[np.float64]
#: times, seconds, load, random -> the share of the fleet that is asked for at each time
Shape = Callable[[Floats, float, float, Generator], Floats]


def _poisson(times: Floats, seconds: float, load: float, random: Generator) -> Floats:
    """A constant rate."""
    return np.full(times.shape, load)


def _diurnal(times: Floats, seconds: float, load: float, random: Generator) -> Floats:
    """One day squeezed into the trace: a twentieth of the mean by night, twice the mean by day."""
    wave = (1 - np.cos(2 * np.pi * times / seconds)) / 2
    return load * (0.05 + 1.95 * wave)


def _flash(times: Floats, seconds: float, load: float, random: Generator) -> Floats:
    """A trickle; now and then a crowd that comes within 10 s, stays for two minutes and fades."""
    rate = np.full(times.shape, 0.03)
    crowds = max(1, round(seconds / 900.0))
    for place in range(crowds):
        begin = seconds * (place + random.uniform(0.1, 0.6)) / crowds
        after = times - begin
        rise = np.clip(after / 10.0, 0.0, 1.0)
        fade = np.where(after > 130.0, np.exp(-(after - 130.0) / 120.0), 1.0)
        rate = np.maximum(rate, rise * fade)
    return load * rate


def _burst(times: Floats, seconds: float, load: float, random: Generator) -> Floats:
    """Nothing, except bursts of two seconds at random times."""
    rate = np.zeros(times.shape)
    gaps = random.exponential(1.0, size=_bursts(seconds)) + 0.25
    at = 30.0 + (seconds - 90.0) * np.cumsum(gaps) / (gaps.sum() + 1.0)
    sizes = random.uniform(0.5, 1.5, size=at.shape)
    for begin, size in zip(at, sizes * len(at) / sizes.sum(), strict=True):
        rate[(times >= begin) & (times < begin + 2.0)] += size
    return rate * load * seconds / (2.0 * len(at))


def _bursts(seconds: float) -> int:
    return max(1, round(seconds / 600.0))


_SHAPES: dict[Pattern, Shape] = {
    "burst": _burst,
    "diurnal": _diurnal,
    "flash": _flash,
    "poisson": _poisson,
}


def read(file: Path, step_s: float) -> Trace:
    """Read a trace: CSV lines ``second,tasks[,queue]``, with or without a heading.

    Raises InputError with the line that is wrong.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(_rows(file, csv.reader(lines)))
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot be read: {exc}", str(file)) from exc
    if not rows:
        raise InputError("holds no arrivals; a line is: second,tasks[,queue]", str(file))
    arrivals = {queue: _gathered([r for r in rows if r[2] == queue], step_s) for queue in QUEUES}
    seconds = max(second for second, _, _ in rows) + step_s
    return Trace(file.stem, seconds, step_s, {q: pair for q, pair in arrivals.items() if len(pair[0])})


def _rows(file: Path, lines: Iterable[list[str]]) -> Iterable[tuple[float, int, QueueName]]:
    first = True
    for number, line in enumerate(lines, start=1):
        if not line or line[0].startswith("#"):
            continue
        heading, first = first and not any(map(str.isdigit, ",".join(line))), False
        if heading:
            continue
        try:
            second, tasks, queue = float(line[0]), int(line[1]), line[2].strip() if line[2:] else "default"
        except (ValueError, IndexError):
            raise InputError(
                f"line {number}: {','.join(line)!r} is not second,tasks[,queue]", str(file)
            ) from None
        known = next((name for name in QUEUES if name == queue), None)
        if known is None or not 0 <= second <= 1e7 or not 0 <= tasks <= 10**9:
            raise InputError(
                f"line {number}: second must be 0 to 10 million, tasks 0 to 1,000,000,000, "
                f"queue one of {', '.join(QUEUES)}",
                str(file),
            )
        yield second, tasks, known


def _gathered(rows: list[tuple[float, int, QueueName]], step_s: float) -> tuple[Counts, Counts]:
    steps = np.array([int(second / step_s) for second, _, _ in rows], dtype=np.int64)
    counts = np.array([tasks for _, tasks, _ in rows], dtype=np.int64)
    places, inverse = np.unique(steps, return_inverse=True)
    sums = np.bincount(inverse, weights=counts, minlength=len(places)).astype(np.int64)
    return places[sums > 0], sums[sums > 0]
