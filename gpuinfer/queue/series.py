# SPDX-License-Identifier: Apache-2.0
"""The fleet's recent metrics, for hosts without a monitoring system: series of numbers in Redis.

Each series has a value every 10 s for 48 hours, and a mean every 5 minutes for 30 days. A value takes two
bytes, eight bits of exponent and eight of mantissa, so its error is at most 0.2 %. A series is stored in
chunks, strings of six hours or of five days, which expire one by one. 200 series take about 12 MiB.

Series of the fleet: waiting, in_flight, ended, failed, requests, refused (the last four per second), workers,
busy (mean share of time that a device was busy), dead_letters, redis_bytes. Of each model, such as
``waiting:resnet``: waiting, ended, failed, oldest (seconds). Of each worker, ``busy:gpu0@host``: busy, ended.

    found = read(client, ["waiting", "ended"], since_s=3600, step_s=60)
    found.values["waiting"]   # 60 numbers, the oldest first; None where nothing was written
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from gpuinfer.queue import keys
from gpuinfer.queue.scripts import bind

#: Maximum number of series.
MOST = 200


class Grid(NamedTuple):
    """How often a series has a value, and for how long it is kept, in seconds."""

    step_s: int
    chunk_s: int
    kept_s: int

    @property
    def chunk_bytes(self) -> int:
        return 2 * self.chunk_s // self.step_s


FINE = Grid(10, 6 * 3600, 48 * 3600)
COARSE = Grid(300, 5 * 86400, 30 * 86400)


@dataclass(frozen=True, slots=True)
class Found:
    """Some series over a time span."""

    #: When the first step began, in Unix seconds by Redis's clock.
    start: float
    step_s: int
    #: Series -> the mean of each step; None where nothing was written.
    values: Mapping[str, tuple[float | None, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        series = {name: list(values) for name, values in self.values.items()}
        return {"start": self.start, "step_s": self.step_s, "series": series}


def pack(value: float) -> bytes:
    """Return a number as two bytes. A negative one becomes 0; NaN and infinity become "no value"."""
    if math.isnan(value) or math.isinf(value):
        return b"\0\0"
    (bits,) = struct.unpack("<I", struct.pack("<f", min(max(value, 0.0), 3e38)))
    # The sign bit is always 0, so it is dropped; the last bit kept is rounded; the code 0 means no value.
    return struct.pack("<H", min(((bits + 0x4000) >> 15) + 1, 0xFFFF))


def unpack(data: bytes) -> list[float | None]:
    """Return the numbers in these bytes; None for "no value"."""
    found: list[float | None] = []
    for (code,) in struct.iter_unpack("<H", data[: len(data) // 2 * 2]):
        found.append(struct.unpack("<f", struct.pack("<I", (code - 1) << 15))[0] if code else None)
    return found


def write(client: redis.Redis, grid: Grid, at: float, values: Mapping[str, float]) -> int:
    """Write the values of the step that contains ``at``; return how many series exceeded ``MOST``.

    Raises redis-py's errors.
    """
    chunk, within = divmod(int(at), grid.chunk_s)
    args: list[Any] = [
        *(_prefix(grid, chunk), grid.chunk_bytes, 2 * (within // grid.step_s)),
        *(grid.kept_s + grid.chunk_s, int(at), MOST),
    ]
    for name, value in values.items():
        args += (name, pack(value))
    return int(bind(client, "record")(keys=[], args=args))


def names(client: redis.Redis) -> dict[str, float]:
    """Return each series' name and when it was last written. Raises redis-py's errors."""
    found: dict[bytes, bytes] = client.hgetall(keys.SERIES)  # type: ignore[assignment]  # not decoded
    return {name.decode(errors="replace"): _seconds(at) for name, at in found.items()}


def _seconds(text: bytes) -> float:
    """Return a time; 0 for a malformed one, so that its series is removed."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def forget(client: redis.Redis, now: float) -> None:
    """Remove the names of series whose last value has expired, to make room. Raises redis-py's errors."""
    void = [name for name, at in names(client).items() if now - at > COARSE.kept_s]
    if void:
        client.hdel(keys.SERIES, *void)


def read(client: redis.Redis, names: Sequence[str], since_s: float, step_s: int = 0) -> Found:
    """Return the last ``since_s`` seconds of some series, in steps of ``step_s`` seconds (0: as stored).

    A step is rounded up to a multiple of 10 s, or of 300 s for more than 48 hours. The last step has not
    ended yet. Raises redis-py's errors.
    """
    seconds, _ = client.time()
    return read_at(client, names, float(seconds), since_s, step_s)


def read_at(client: redis.Redis, names: Sequence[str], now: float, since_s: float, step_s: int = 0) -> Found:
    """Return series as ``read`` does, up to ``now``."""
    grid = FINE if since_s <= FINE.kept_s and step_s < COARSE.step_s else COARSE
    since_s = min(since_s, grid.kept_s)
    step_s = max(1, math.ceil(step_s / grid.step_s)) * grid.step_s
    last = int(now) // step_s + 1
    start = last - max(1, math.ceil(since_s / step_s))
    spans = list(_spans(grid, start * step_s, last * step_s))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            for chunk, first, end in spans:
                pipe.getrange(f"{_prefix(grid, chunk)}{name}", first, end - 1)
        answers = iter(pipe.execute())
    values = {}
    for name in names:
        flat: list[float | None] = []
        for _, first, end in spans:
            found = unpack(next(answers))
            flat += found + [None] * ((end - first) // 2 - len(found))
        values[name] = _joined(flat, step_s // grid.step_s)
    return Found(float(start * step_s), step_s, values)


def _prefix(grid: Grid, chunk: int) -> str:
    return f"{keys.SERIES_PREFIX}{grid.step_s}:{chunk}:"


def _spans(grid: Grid, start: int, end: int) -> Iterable[tuple[int, int, int]]:
    """Yield (chunk, first byte, byte after the last) for the time from ``start`` to ``end``."""
    for chunk in range(start // grid.chunk_s, (end - 1) // grid.chunk_s + 1):
        begins = chunk * grid.chunk_s
        first = max(0, start - begins) // grid.step_s
        stop = min(grid.chunk_s, end - begins) // grid.step_s
        yield chunk, 2 * first, 2 * stop


def _joined(flat: Sequence[float | None], width: int) -> tuple[float | None, ...]:
    """Return the mean of each ``width`` values, ignoring missing ones."""
    if width == 1:
        return tuple(flat)
    means: list[float | None] = []
    for first in range(0, len(flat), width):
        there = [value for value in flat[first : first + width] if value is not None]
        means.append(sum(there) / len(there) if there else None)
    return tuple(means)
