# SPDX-License-Identifier: Apache-2.0
"""Tables that fit: the least important columns are left out until the others fit. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gpuinfer.view.words import NONE, cut

Row = TypeVar("Row")
#: Spaces between two columns.
GAP = 2


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column."""

    name: str
    #: Row -> its text.
    cell: Callable[[Row], str]
    #: 0: never left out; the highest is left out first.
    rank: int = 0
    right: bool = False
    #: Minimum width to cut it to before another column is left out; 0: never cut.
    least: int = 0
    #: Row -> a style of rich for its cell; empty: none.
    style: Callable[[Row], str] = lambda _row: ""


@dataclass(frozen=True)
class Cell:
    """One padded cell."""

    text: str
    style: str = ""


def fit(columns: Sequence[Column[Row]], rows: Sequence[Row], width: int) -> list[list[Cell]]:
    """Return the header and the rows, padded, within ``width``. An empty column is left out."""
    texts = {column.name: [column.cell(row) for row in rows] for column in columns}
    kept = [
        one for one in columns if one.rank == 0 or any(text not in ("", NONE) for text in texts[one.name])
    ]
    widths = {one.name: max(map(len, [one.name, *texts[one.name]])) for one in kept}
    while (over := _total(kept, widths) - width) > 0:
        soft = [one for one in kept if one.least and widths[one.name] > one.least]
        last = max(kept, key=lambda one: one.rank)
        if sum(widths[one.name] - one.least for one in soft) < over and last.rank > 0:
            kept.remove(last)
            continue
        if not soft:
            break
        widest = max(soft, key=lambda one: widths[one.name] - one.least)
        widths[widest.name] -= 1
    lines = [[Cell(_pad(one.name, one, widths), "dim") for one in kept]]
    for place, row in enumerate(rows):
        lines.append([Cell(_pad(texts[one.name][place], one, widths), one.style(row)) for one in kept])
    return lines


def _total(kept: Sequence[Column[Row]], widths: dict[str, int]) -> int:
    return sum(widths[one.name] for one in kept) + GAP * (len(kept) - 1)


def _pad(text: str, column: Column[Row], widths: dict[str, int]) -> str:
    width = widths[column.name]
    text = cut(text, width)
    return text.rjust(width) if column.right else text.ljust(width)
