# SPDX-License-Identifier: Apache-2.0
"""Usage by UTC hour, key and model, which processes update once a second.

The front counts requests, errors, refusals and bytes. Workers count device time: that of a batch is divided
among its inputs, and counted for the callers that submitted them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import redis
import redis.asyncio

from gpuinfer.errors import InputError
from gpuinfer.queue import keys

By = Literal["key", "model"]
#: The fields of an account, in display order.
KINDS = ("requests", "errors", "refused", "bytes_in", "bytes_out", "device_us")
_UNIT_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SINCE = re.compile(r"(\d{1,6})\s*([mhdw])")
USUAL_S = 86400
MOST_S = keys.USAGE_KEPT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The usage of one model by one key; "-" means none. After ``Usage.by``, one of the two is empty."""

    key: str
    model: str
    requests: int = 0
    errors: int = 0
    refused: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    device_us: int = 0

    def __add__(self, other: Account) -> Account:
        return replace(self, **{kind: getattr(self, kind) + getattr(other, kind) for kind in KINDS})

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; device time in seconds."""
        names = {name: value for name in ("key", "model") if (value := getattr(self, name))}
        counts = {kind: getattr(self, kind) for kind in KINDS[:-1]}
        return {**names, **counts, "device_s": self.device_us / 1e6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The accounts of some hours."""

    #: The beginning of the first hour included; ``until``: Redis's time. Both in Unix seconds.
    since: float
    until: float
    accounts: tuple[Account, ...] = field(default_factory=tuple)

    def by(self, what: By | None) -> Usage:
        """Return it summed by key, or by model (None: by both), sorted by device time, the most first."""
        summed: dict[tuple[str, str], Account] = {}
        for one in self.accounts:
            only = one
            if what is not None:
                only = replace(one, model="") if what == "key" else replace(one, key="")
            place = (only.key, only.model)
            summed[place] = summed[place] + only if place in summed else only
        ordered = sorted(summed.values(), key=lambda one: (-one.device_us, -one.requests, one.key, one.model))
        return replace(self, accounts=tuple(ordered))

    def only(self, key: str) -> Usage:
        """Return the accounts of one key."""
        return replace(self, accounts=tuple(one for one in self.accounts if one.key == key))

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "since": datetime.fromtimestamp(self.since, UTC).isoformat(),
            "until": datetime.fromtimestamp(self.until, UTC).isoformat(timespec="seconds"),
            "usage": [one.to_dict() for one in self.accounts],
        }


def since_of(text: str, name: str = "since") -> int:
    """Return the seconds of a time span such as ``90m``, ``24h``, ``7d``. Raises InputError."""
    found = _SINCE.fullmatch(text.strip())
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= MOST_S:
        most = MOST_S // 86400
        raise InputError(
            f"must be a time span of at most {most} days such as 90m, 24h or 7d, got {text[:40]!r}", name
        )
    return seconds


def _hours(now: float, since_s: float) -> list[int]:
    return list(range(int(now - since_s) // 3600, int(now) // 3600 + 1))


def _key(hour: int) -> str:
    return f"{keys.USAGE_PREFIX}{hour}"


def read(client: redis.Redis, since_s: float = USUAL_S) -> Usage:
    """Return the accounts of the hours of the last ``since_s`` seconds. Raises redis-py's errors."""
    seconds, microseconds = client.time()
    now = seconds + microseconds / 1e6
    with client.pipeline(transaction=False) as pipe:
        for hour in _hours(now, since_s):
            pipe.hgetall(_key(hour))
        return parse(now, since_s, pipe.execute())


async def aread(client: redis.asyncio.Redis, since_s: float = USUAL_S) -> Usage:
    """Do what ``read`` does, with an asyncio client."""
    seconds, microseconds = await client.time()
    now = seconds + microseconds / 1e6
    async with client.pipeline(transaction=False) as pipe:
        for hour in _hours(now, since_s):
            pipe.hgetall(_key(hour))
        return parse(now, since_s, await pipe.execute())


def parse(now: float, since_s: float, hours: Sequence[Mapping[bytes, bytes]]) -> Usage:
    """Return the accounts in the hashes of some hours, summed over these hours."""
    sums: dict[tuple[str, str], dict[str, int]] = {}
    for kind, key, model, count in _fields(hours):
        account = sums.setdefault((key, model), {})
        account[kind] = account.get(kind, 0) + count
    accounts = tuple(Account(key=key, model=model, **counts) for (key, model), counts in sums.items())
    return Usage(since=_hours(now, since_s)[0] * 3600.0, until=now, accounts=accounts).by(None)


def _fields(hours: Iterable[Mapping[bytes, bytes]]) -> Iterable[tuple[str, str, str, int]]:
    for hour in hours:
        for name, count in hour.items():
            kind, key, model = name.decode(errors="replace").split(" ")
            if kind in KINDS:
                yield kind, key, model, int(count)
