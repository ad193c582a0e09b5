# SPDX-License-Identifier: Apache-2.0
"""Shared by the commands of ``gpuinfer model``: the repository, tables and JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from gpuinfer.models.repository import Repository
    from gpuinfer.settings import Loaded

#: Width of tables if the output is not a terminal, so that a pipe gets whole lines.
_PIPE_WIDTH = 200
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def repository(loaded: Loaded) -> Repository:
    """Return the repository of the folders in the settings."""
    from gpuinfer.models.repository import Repository

    return Repository(loaded.settings.models.folders)


def console(most: int = _PIPE_WIDTH) -> Console:
    """Return a console for tables: of ``most`` columns, or as wide as the terminal if that is less."""
    from rich.console import Console

    found = Console(width=None if sys.stdout.isatty() else most, highlight=False)
    found.width = min(found.width, most)
    return found


def print_json(value: object) -> None:
    """Print indented JSON."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_result(result: dict[str, Any]) -> None:
    """Print one result: a table of the best classes, or the outputs as JSON."""
    from rich.table import Table
    from rich.text import Text

    if "top_k" not in result:
        click.echo(json.dumps(result.get("outputs", result.get("output", result)), allow_nan=False))
        return
    table = Table("class", "label", "confidence", box=None, header_style="bold")
    for row in result["top_k"]:
        confidence = "" if row["confidence"] is None else f"{row['confidence']:.6f}"
        table.add_row(str(row["class"]), Text(row["label"]), confidence)
    console().print(table)
