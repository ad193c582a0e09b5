# SPDX-License-Identifier: Apache-2.0
"""Numbers as short text. None is a dash."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_SIZES = ((1024**4, "T"), (1024**3, "G"), (1024**2, "M"), (1024, "K"))
NONE = "-"


def count(value: float | None) -> str:
    """Return a count: ``12,345``, ``1.2 M``."""
    if value is None:
        return NONE
    return f"{value / 1e6:.1f} M" if value >= 10_000_000 else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Return a rate: ``0.3/s``, ``120/s``."""
    if value is None:
        return NONE
    return f"{value:,.0f}/s" if value >= 10 or value == 0 else f"{value:.1f}/s"


def share(value: float | None) -> str:
    """Return a share of 1: ``82%``."""
    return NONE if value is None else f"{100 * value:.0f}%"


def size(value: float | None) -> str:
    """Return bytes: ``12.4G``, ``340M``."""
    if value is None:
        return NONE
    for unit, letter in _SIZES:
        if value >= unit:
            amount = value / unit
            return f"{amount:.1f}{letter}" if amount < 10 else f"{amount:.0f}{letter}"
    return f"{value:.0f}B"


def of(used: float | None, total: float | None) -> str:
    """Return ``12/141G``; if the total is unknown, only the part used."""
    if used is None or not total:
        return size(used)
    return f"{size(used)}/{size(total)}"


def span(seconds: float | None) -> str:
    """Return a time: ``0.3 s``, ``45 s``, ``12 min``, ``3 h``, ``4 d``."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, letter, most in ((1, "s", 120), (60, "min", 120 * 60), (3600, "h", 48 * 3600)):
        if seconds < most:
            return f"{seconds / unit:.0f} {letter}"
    return f"{seconds / 86400:.0f} d"


def spark(values: Sequence[float | None], width: int) -> str:
    """Return values as one line of at most ``width`` blocks; None is a space.

    A block that stands for several values shows the largest. The scale starts at 0.
    """
    if not values or width <= 0:
        return ""
    per = max(1, -(-len(values) // width))
    groups = [values[max(0, end - per) : end] for end in range(len(values), 0, -per)][::-1]
    tops = [max((value for value in group if value is not None), default=None) for group in groups]
    most = max((top for top in tops if top is not None), default=0.0)
    return "".join(" " if top is None else _BLOCKS[round(7 * top / most) if most > 0 else 0] for top in tops)


def short(name: str) -> str:
    """Return a GPU's name without its manufacturer."""
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ")


def cut(text: str, width: int) -> str:
    """Return the text, cut to ``width`` characters."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
