# SPDX-License-Identifier: Apache-2.0
"""Shell completion without Redis: names of installed models, and files.

It reads settings without pydantic, whose import would take longer than everything else.
"""

from __future__ import annotations

import os
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

_FILE = Path("/etc/gpuinfer/gpuinfer.toml")
_FOLDER = Path("/var/lib/gpuinfer/models")
_SHIPPED = Path(__file__).parent / "shipped"


def setting(ctx: click.Context, section: str, key: str, *types: type) -> Any:
    """Return a setting from its variable or the settings file; None if not set or not one of ``types``.

    No other checks are made.
    """
    given = os.environ.get(f"GPUINFER_{section}_{key}".upper())
    if given:
        return given
    file = ctx.find_root().params.get("file") or os.environ.get("GPUINFER_CONFIG") or _FILE
    try:
        with Path(file).open("rb") as opened:
            found = tomllib.load(opened).get(section, {}).get(key)
    except (OSError, ValueError, AttributeError):  # completion must not print errors
        return None
    return found if isinstance(found, types) else None


def names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of this host's models: folders with a model.toml."""
    folders = setting(ctx, "models", "folders", str, list) or [_FOLDER]
    if isinstance(folders, str):
        folders = [part.strip() for part in folders.split(",") if part.strip()]
    found: set[str] = set()
    for folder in (*folders, _SHIPPED):
        with suppress(OSError, TypeError, ValueError):
            found |= {file.parent.name for file in Path(folder).glob("*/model.toml")}
    return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete)]


def names_or_files(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of models, and paths."""
    return [*names(ctx, parameter, incomplete), CompletionItem(incomplete, type="file")]


def files(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete paths."""
    return [CompletionItem(incomplete, type="file")]
