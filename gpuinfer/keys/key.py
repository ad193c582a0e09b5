# SPDX-License-Identifier: Apache-2.0
"""An API key: its name, rights and limits, and the SHA-256 of its token, stored as one TOML file.

The token is 256 random bits, so a plain hash without salt or many rounds is enough. It is not stored.
"""

from __future__ import annotations

import math
import re
import secrets
import tomllib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from hashlib import sha256
from typing import Any, Literal

from gpuinfer.errors import BadKey
from gpuinfer.names import MODEL_NAME, QUEUES
from gpuinfer.queue.quota import Quota

Role = Literal["predict", "read", "admin"]
ROLES: tuple[Role, ...] = ("predict", "read", "admin")
#: The name of a key is the caller of its tasks, and part of the names of Redis lists.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
NAME_WORDS = "1 to 32 of a-z 0-9 _ - and begin with a letter or a digit"
TOKEN_PREFIX = "gpi_"  # noqa: S105  the common prefix is not a secret
#: A key file is called NAME + this.
SUFFIX = ".toml"
#: Leading characters of a token that its file shows, so that people can recognise it.
_SHOWN = 10
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*/\s*(s|min|h)")
#: Unit of a rate -> seconds.
_UNITS = {"s": 1, "min": 60, "h": 3600}
_MOST_RATE = 1e6
_MOST = 2**50


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key. An empty tuple or zero means no limit."""

    name: str
    role: Role = "predict"
    #: SHA-256 of the token: 64 hex digits.
    sha256: str
    #: The models and queues that it may use.
    models: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    #: Tasks per second, and tasks at once. burst 0: a quarter of a second's tasks, at least 1.
    rate: float = 0.0
    burst: int = 0
    #: Maximum waiting tasks of this key, and their bytes.
    max_waiting: int = 0
    max_waiting_bytes: int = 0
    #: Share of the workers' time, relative to other keys with waiting tasks.
    weight: int = 1
    #: When it expires, in seconds since the epoch; None: never.
    expires: float | None = None
    created: float | None = None
    #: First characters of its token.
    prefix: str = ""
    #: SHA-256 of the token before the last rotation, and when that one expires.
    old_sha256: str = ""
    old_expires: float | None = None
    #: The limits that the queue enforces; None: no limits.
    quota: Quota | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        quota = Quota(
            rate=self.rate,
            burst=self.burst,
            max_waiting=self.max_waiting,
            max_waiting_bytes=self.max_waiting_bytes,
        )
        if quota.text:
            object.__setattr__(self, "quota", quota)


def make_token() -> str:
    """Return a new token: ``gpi_`` and 43 characters for 32 random bytes."""
    return TOKEN_PREFIX + urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def digest(token: str | bytes) -> str:
    """Return the SHA-256 of a token: 64 hex digits."""
    return sha256(token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")).hexdigest()


def shown(token: str) -> str:
    """Return the first characters of a token, by which people recognise it."""
    return token[:_SHOWN]


def checked_name(name: str) -> str:
    """Return the name if it is valid. Raises BadKey."""
    if not NAME.fullmatch(name):
        raise BadKey(f"must be {NAME_WORDS}, got {name[:80]!r}", "name")
    return name


# -- the fields of a file ---------------------------------------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text in quotes")  # noqa: TRY004  read_fields reports ValueError
    return value


def _role(value: object) -> Role:
    if value not in ROLES:
        raise ValueError(f"must be one of {', '.join(ROLES)}")
    return value


def _hash(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("must be the token's SHA-256: 64 hex digits in lower case")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ValueError('must be a list of strings, such as ["a", "b"]')
    return tuple(dict.fromkeys(value))


def _models(value: object) -> tuple[str, ...]:
    found = _names(value)
    for name in found:
        if not MODEL_NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is not a model name: must be 1 to 64 of a-z 0-9 _ . -")
    return found


def _queues(value: object) -> tuple[str, ...]:
    found = _names(value)
    for name in found:
        if name not in QUEUES:
            raise ValueError(f"{name[:80]!r} is not a queue: must be one or more of {', '.join(QUEUES)}")
    return found


def rate_of(value: object) -> float:
    """Return ``50/s``, ``100/min`` or ``1000/h`` as tasks per second. Raises ValueError."""
    found = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    rate = float(found[1]) / _UNITS[found[2]] if found else 0.0
    if not 0 < rate <= _MOST_RATE:
        raise ValueError("must be a number above 0 per unit, such as 50/s, 100/min or 1000/h")
    return rate


def per_unit(rate: float) -> tuple[int, int]:
    """Return (number, seconds): the rate as whole tasks, at least 1, per second, minute or hour."""
    for seconds in _UNITS.values():
        number = rate * seconds
        if number >= 1 and math.isclose(number, round(number), rel_tol=1e-9):
            return round(number), seconds
    return max(1, round(rate * 3600)), 3600


def rate_text(rate: float) -> str:
    """Return a rate as written in a key file, in the first unit that makes it a whole number."""
    number, seconds = per_unit(rate)
    if math.isclose(number, rate * seconds, rel_tol=1e-9):
        return f"{number}/{next(unit for unit, one in _UNITS.items() if one == seconds)}"
    return f"{rate:.6f}/s" if rate >= 1 else f"{rate * 3600:.6f}/h"


def time_text(at: float) -> str:
    """Return a Unix time as a file has it: ``2027-01-31T12:00:00Z``."""
    return datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _whole(least: int, most: int) -> Callable[[object], int]:
    def checked(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return value

    return checked


def _moment(value: object) -> float:
    if isinstance(value, datetime):
        if value.tzinfo is not None:
            return value.timestamp()
    elif isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    raise ValueError("must be a time with a zone and without quotes, such as 2027-01-31T00:00:00Z")


#: Field -> its parser. Each raises ValueError that says what would be right.
_READ: Mapping[str, Callable[[object], Any]] = {
    "role": _role,
    "sha256": _hash,
    "prefix": _text,
    "models": _models,
    "queues": _queues,
    "rate": rate_of,
    "burst": _whole(0, 10**9),
    "max_waiting": _whole(0, 10**9),
    "max_waiting_bytes": _whole(0, _MOST),
    "weight": _whole(1, 1000),
    "created": _moment,
    "expires": _moment,
    "old_sha256": _hash,
    "old_expires": _moment,
}
_NEEDED = ("role", "sha256")


def read_fields(given: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """Return the parsed valid fields, and one error for each invalid one."""
    found, wrong = {}, []
    for name, value in given.items():
        read = _READ.get(name)
        if read is None:
            wrong.append(f"{name[:80]} is not a field of a key; the fields are {', '.join(_READ)}")
            continue
        try:
            found[name] = read(value)
        except ValueError as exc:
            said = f" = {value!r:.80}" if "sha256" not in name else ""
            wrong.append(f"{name}{said}: {exc}")
    return found, wrong


def parse(name: str, text: str) -> Key:
    """Parse the text of a key file. Raises BadKey, which names every invalid field."""
    checked_name(name)
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise BadKey(f"is not valid TOML: {exc}", name + SUFFIX) from None
    found, wrong = read_fields(given)
    wrong += [f"{one} is missing" for one in _NEEDED if one not in given]
    if ("old_sha256" in given) != ("old_expires" in given):
        wrong.append("old_sha256 and old_expires must be set together")
    if wrong:
        raise BadKey("; ".join(wrong), name + SUFFIX)
    return Key(name=name, **found)


def serialise(key: Key) -> str:
    """Return the text of a key file, without fields that have their default."""
    lines = [
        f"# API key {key.name} of gpuinfer. Changes to this file take effect within a second.",
        f"# The token itself is not stored. `gpuinfer key rotate {key.name}` makes a new one.",
    ]
    for one in fields(Key):
        value = getattr(key, one.name)
        if one.name == "name" or not one.init or (one.name not in _NEEDED and value == one.default):
            continue
        lines.append(f"{one.name} = {_written(one.name, value)}")
    return "\n".join(lines) + "\n"


def _written(field: str, value: Any) -> str:
    if field == "rate":
        return f'"{rate_text(value)}"'
    if isinstance(value, float):
        return time_text(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_quoted, value))}]"
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    """Quote names, hex digits or base64url for TOML; they need no escapes."""
    return f'"{text}"'
