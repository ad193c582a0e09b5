# SPDX-License-Identifier: Apache-2.0
"""How the queue's commands print JSON and tables, and report an invalid option."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import orjson

from gpuinfer.errors import InputError, UsageError

#: Width of tables where the output is no terminal, so that a pipe gets whole lines.
_PIPE_WIDTH = 240

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def as_usage() -> Iterator[None]:
    """Turn an InputError into a UsageError that names the option: here the input is the command line."""
    try:
        yield
    except InputError as exc:
        raise UsageError(exc.message, f"--{exc.field}" if exc.field else None) from None


def print_json(value: Any) -> None:
    """Print indented JSON; NaN and infinity become null."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))


def one_line(value: Any) -> str:
    """Return JSON on one line."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table without lines. Cells are printed literally, without markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, highlight=False).print(table)
