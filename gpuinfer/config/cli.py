# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer config``: check the settings, and show each with its origin."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import click

from gpuinfer import instances
from gpuinfer.broker import last_good
from gpuinfer.cli_help import examples
from gpuinfer.config import restarts, useless
from gpuinfer.errors import ConfigError
from gpuinfer.settings import Loaded, Settings, is_secret, load, settings_file, shown, variable
from gpuinfer.sources import ENV_PREFIX


@click.group()
def config() -> None:
    """Check and show the settings."""


@config.command(epilog=examples("gpuinfer config check", "gpuinfer --config new.toml config check --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Check all settings, and each worker's own file (worker@N.env).

    The certificate of api.tls_cert is loaded, as by the API. It warns of settings that are accepted and
    do nothing, and names the units that run with older settings. Exit code 78: a setting is wrong; the first
    wrong one is named.
    """
    loaded: Loaded = ctx.obj
    file = settings_file(ctx.find_root().params.get("file"))
    changed = len(loaded.changed)
    workers = list(_workers(file))
    _check_certificate(loaded.settings)
    warnings = useless.warnings(useless.Given(loaded))
    for worker in workers:
        warnings += [*worker.remarks, *useless.warnings(useless.Given(worker.loaded, worker.number))]
    restart = _restart(loaded, file, workers)
    if as_json:
        own = {str(worker.number): len(worker.own) for worker in workers}
        answer = {"ok": True, "changed": changed, "workers": own, "warnings": warnings, "restart": restart}
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(f"ok: {_settings(changed)} changed")
    for worker in workers:
        click.echo(f"ok: worker {worker.number}: {_settings(len(worker.own))} of its own ({worker.file})")
    for line in warnings:
        click.echo(f"warning: {line}")
    if restart:
        click.echo(f"to apply the changes: systemctl restart {' '.join(restart)}")


def _check_certificate(settings: Settings) -> None:
    """Raise ConfigError if the API could not use its certificate; a user who may not read it is not told."""
    cert, key = settings.api.tls_cert, settings.api.tls_key
    if cert is None:
        return
    if os.geteuid() == 0 or all(os.access(path, os.R_OK) for path in (cert, key or cert)):
        from gpuinfer.api.tls import Certificate

        Certificate(cert, key)


def _settings(count: int) -> str:
    return "1 setting" if count == 1 else f"{count} settings"


@config.command(epilog=examples("gpuinfer config show", "gpuinfer config show --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def show(ctx: click.Context, as_json: bool) -> None:
    """Print every setting with its value and origin.

    The settings of each worker's own file follow. Passwords are hidden.
    """
    loaded: Loaded = ctx.obj
    rows = list(_rows(loaded))
    workers = list(_workers(settings_file(ctx.find_root().params.get("file"))))
    if as_json:
        own = {str(worker.number): _by_name(worker.rows) for worker in workers}
        click.echo(json.dumps({"settings": _by_name(rows), "workers": own}, indent=2))
        return
    width = max(len(str(row["setting"])) for row in rows)
    for row in rows:
        origin = "" if row["origin"] == "default" else f"   ({row['origin']})"
        click.echo(f"{row['setting']:{width}} = {row['shown']}{origin}")
    for worker in workers:
        click.echo(f"\nworker {worker.number} ({worker.file})")
        for row in worker.rows:
            click.echo(f"{row['setting']:{width}} = {row['shown']}   ({row['origin']})")


def _by_name(rows: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = ("value", "origin", "variable")
    return {row["setting"]: {key: row[key] for key in wanted} for row in rows}


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


@dataclass(frozen=True)
class _Worker:
    """A worker with a file of its own, and the settings that it would run with."""

    number: int
    file: Path
    loaded: Loaded
    remarks: tuple[str, ...]

    @property
    def own(self) -> Mapping[str, str]:
        """Return the settings from its own file: name -> origin."""
        found = self.loaded.origins.items()
        return {name: origin for name, origin in found if origin.startswith(ENV_PREFIX)}

    @property
    def rows(self) -> list[dict[str, Any]]:
        found = [row for row in _rows(self.loaded) if row["setting"] in self.own]
        return [{**row, "origin": f"{self.file}: {row['variable']}"} for row in found]


def _workers(file: Path) -> Iterator[_Worker]:
    """Yield the workers with files of their own, read as their units read them.

    Raises ConfigError naming the file.
    """
    for number in instances.with_file(file.parent):
        own = instances.file_of(number, file.parent)
        try:
            environ = {"GPUINFER_CONFIG": str(file), **instances.read(number, file.parent)}
            remarks = tuple(f"{own}: {remark}" for remark in instances.remarks(number, file.parent))
            yield _Worker(number, own, load(environ=environ, user="worker"), remarks)
        except ConfigError as exc:
            raise ConfigError(str(exc), str(own)) from None
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc.strerror or exc}", str(own)) from None


def _restart(loaded: Loaded, file: Path, workers: list[_Worker]) -> list[str]:
    running = restarts.started()
    if not running:
        return []
    changed, then = _changed_at(file), _changed_at(last_good.FILE)
    # Compare with the settings of Redis's last start, unless it was restarted after the change.
    kept = last_good.kept() if then < changed else None
    sections = restarts.changed_since(last_good.given(loaded.settings), kept)
    return restarts.needed(
        running, changed, sections, {worker.number: _changed_at(worker.file) for worker in workers}
    )


def _changed_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
