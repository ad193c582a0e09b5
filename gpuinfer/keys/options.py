# SPDX-License-Identifier: Apache-2.0
"""How ``gpuinfer key`` reads its options: spans, dates, sizes, and the fields of a key's file."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from gpuinfer.errors import GpuinferError
from gpuinfer.keys import key as keys
from gpuinfer.keys import writing
from gpuinfer.models.completion import setting

_SPAN = re.compile(r"(\d{1,6})\s*(s|min|m|h|d|w)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]?)(?:iB|B)?")
_SIZES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_FOLDER = Path("/etc/gpuinfer/keys.d")


def names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of keys; offer nothing if they cannot be read."""
    folder = Path(setting(ctx, "api", "keys_dir", str) or _FOLDER)
    try:
        return [CompletionItem(name) for name in writing.names(folder) if name.startswith(incomplete)]
    except (GpuinferError, ValueError):  # not a valid path
        return []


def field(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that parses an option like this field of a key file. It raises BadParameter."""

    def read(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if value is None or value == ():
            return None
        if isinstance(value, tuple):
            value = [part.strip() for text in value for part in text.split(",") if part.strip()]
        found, wrong = keys.read_fields({name: value})
        if wrong:
            raise click.BadParameter(wrong[0].removeprefix(f"{name} = "), param=parameter)
        return found[name]

    return read


def span(_: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Read ``90s``, ``15min``, ``12h``, ``30d`` or ``2w`` as seconds. Raises BadParameter."""
    seconds = _seconds(text) if text is not None else None
    if text is not None and seconds is None:
        raise click.BadParameter(
            f"must be a time span such as 15min, 12h or 30d, got {text!r}", param=parameter
        )
    return seconds


def _seconds(text: str) -> float | None:
    """Return a time span in seconds; None if the text is not a time span."""
    found = _SPAN.fullmatch(text.strip())
    return int(found[1]) * _SECONDS[found[2]] if found else None


def expires(_: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Read a span from now, a date or a time (without a zone: in UTC) as Unix time. Raises BadParameter."""
    if text is None:
        return None
    seconds = _seconds(text)
    if seconds is not None:
        return float(int(time.time() + seconds))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            f"must be a time span or a time, such as 30d, 2027-01-31 or 2027-01-31T12:00:00Z, got {text!r}",
            param=parameter,
        ) from None
    at = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if at <= time.time():
        raise click.BadParameter(f"must be in the future, got {text}", param=parameter)
    return float(int(at))


def size(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Read ``1000000``, ``64M`` or ``2G`` as bytes. Raises BadParameter."""
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise click.BadParameter(
            f"must be a number of bytes such as 1000000, 64M or 2G, got {text!r}", param=parameter
        )
    return int(found[1]) << _SIZES[found[2]]
