# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer config``: are the settings right, what are they, and where does each come from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import click

from gpuinfer.settings import Loaded, Settings, is_secret, shown, variable


@click.group()
def config() -> None:
    """Check and show the settings."""


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def check(loaded: Loaded, as_json: bool) -> None:
    """Read all settings; exit 78 and name the first wrong one, else say ok."""
    changed = len(loaded.origins)
    click.echo(json.dumps({"ok": True, "changed": changed}) if as_json else f"ok: {changed} settings changed")


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def show(loaded: Loaded, as_json: bool) -> None:
    """Print every setting, its value and its origin. Passwords are hidden."""
    rows = list(_rows(loaded))
    if as_json:
        wanted = ("value", "origin", "variable")
        click.echo(json.dumps({row["setting"]: {key: row[key] for key in wanted} for row in rows}, indent=2))
        return
    width = max(len(str(row["setting"])) for row in rows)
    for row in rows:
        origin = "" if row["origin"] == "default" else f"   ({row['origin']})"
        click.echo(f"{row['setting']:{width}} = {row['shown']}{origin}")


def _rows(loaded: Loaded) -> Iterator[dict[str, Any]]:
    for section in Settings.model_fields:
        values = getattr(loaded.settings, section)
        for key in type(values).model_fields:
            name, value = f"{section}.{key}", getattr(values, key)
            yield {
                "setting": name,
                "value": _plain(name, value),
                "shown": shown(name, value),
                "origin": loaded.origins.get(name, "default"),
                "variable": variable(section, key),
            }


def _plain(name: str, value: object) -> object:
    """Return a value for JSON; text and lists through ``shown``, which hides passwords."""
    if is_secret(name):
        return shown(name, value)
    if isinstance(value, tuple):
        return [_plain(name, item) for item in value]
    return shown(name, value) if isinstance(value, str | PurePath) else value
